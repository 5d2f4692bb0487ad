"""Plain-PyTorch definition of patches and of the x-prediction loss."""

import torch
from torch import Tensor

from ..launch import widened


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut (batch, channels, H, W) into (batch, H/p·W/p, channels·p²); features in the order (channel, row, column)."""
    batch, channels, height, width = image.shape
    p = patch_size
    grid = image.reshape(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Inverse of `patchify`: (batch, H/p·W/p, channels·p²) -> (batch, channels, H, W), dtype kept."""
    p = patch_size
    batch, _, features = tokens.shape
    channels = features // (p * p)
    grid = tokens.reshape(batch, height // p, width // p, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def x_prediction_loss(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, *, t_min: float = 0.05) -> Tensor:
    """Per-sample flow-matching loss of an x0 prediction: `mean((x0_hat - x0)² / max(t, t_min)²)`, (batch,) float32.

    With `v = (x_t - x0)/max(t, t_min)` for both target and prediction the noise cancels (docs/recipe.md, "Objective";
    JiT, https://arxiv.org/abs/2511.13720, table 1 (3)(a)).

    Args:
        tokens: (batch, N, channels·p²), the predicted x0; float64 gives a float64 loss.
        image: (batch, channels, H, W), the clean picture in [-1, 1], or uint8.
        t: (batch,) float32 in [0, 1], 0 is clean.
    """
    predicted = widened(tokens)
    error = predicted - patchify(scaled(image), patch_size).to(predicted.dtype)
    return error.square().mean(dim=(1, 2)) / t.float().clamp(min=t_min).square()


def x_prediction_loss_gradient(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, unit: float
) -> tuple[Tensor, Tensor]:
    """Per-sample losses, and `error·unit/max(t, t_min)²` in the dtype of tokens: their gradient for unit 2/elements."""
    predicted = widened(tokens)
    error = predicted - patchify(scaled(image), patch_size).to(predicted.dtype)
    weight = t.float().clamp(min=t_min).square().reciprocal()
    gradient = error * (unit * weight)[:, None, None]
    return error.square().mean(dim=(1, 2)) * weight, gradient.to(tokens.dtype)


def scaled(image: Tensor) -> Tensor:
    """A picture in float32 (float64 for float64), uint8 scaled to [-1, 1]."""
    return image.float() / 127.5 - 1.0 if image.dtype == torch.uint8 else widened(image)
