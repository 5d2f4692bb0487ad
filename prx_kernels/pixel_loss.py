"""The pixel end of an x-predicting transformer: tokens back to an image, and the loss without noise or velocity."""

from typing import Literal

from torch import Tensor

from . import reference


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut (batch, channels, H, W) into (batch, H/p·W/p, channels·p²), features in the order (channel, row, column).

    Raises:
        ValueError: the size is not a multiple of the patch.
    """
    _check_size(image.shape[2], image.shape[3], patch_size)
    return reference.patchify(image, patch_size)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches back in place: (batch, H/p·W/p, channels·p²) -> (batch, channels, H, W), dtype kept.

    Features of a token are in the order (channel, row, column).

    Raises:
        ValueError: the size is not a multiple of the patch, or the token or feature count does not fit.
    """
    _check_size(height, width, patch_size)
    count = (height // patch_size) * (width // patch_size)
    if tokens.shape[1] != count or tokens.shape[2] % patch_size**2:
        raise ValueError(
            f"{height}x{width} in patches of {patch_size} needs {count} tokens of channels·{patch_size**2} features, "
            f"got {tuple(tokens.shape[1:])}"
        )
    return reference.unpatchify(tokens, patch_size, height, width)


def x_prediction_loss(
    tokens: Tensor,
    image: Tensor,
    t: Tensor,
    patch_size: int,
    *,
    t_min: float = 0.05,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Flow-matching loss of an x0 prediction: `mean((x0_hat - x0)² / max(t, t_min)²)`.

    With `t_c = max(t, t_min)` in the velocity of target and prediction the noise drops out (RECIPE.md, "Objective").

    Args:
        tokens: (batch, N, channels·p²) floating, the predicted x0 in patches of order (channel, row, column).
        image: (batch, channels, H, W) floating, the clean picture in [-1, 1].
        t: (batch,) float32 in [0, 1]; 0 is the clean picture.
        patch_size: p; H and W are multiples of it.
        t_min: lower clamp of t.
        reduction: "mean" gives a scalar, "none" one loss a sample.

    Returns:
        float32 scalar or (batch,).

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    batch, channels, height, width = image.shape
    _check_size(height, width, patch_size)
    expected = (batch, (height // patch_size) * (width // patch_size), channels * patch_size**2)
    if tuple(tokens.shape) != expected or tuple(t.shape) != (batch,):
        raise ValueError(
            f"for an image of shape {tuple(image.shape)} tokens must be {expected} and t ({batch},), "
            f"got {tuple(tokens.shape)} and {tuple(t.shape)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    per_sample = reference.x_prediction_loss(tokens, image, t, patch_size, t_min=t_min)
    return per_sample.mean() if reduction == "mean" else per_sample


def _check_size(height: int, width: int, patch_size: int) -> None:
    if height % patch_size or width % patch_size:
        lower = (height // patch_size * patch_size, width // patch_size * patch_size)
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size {patch_size}; "
            f"{max(lower[0], patch_size)}x{max(lower[1], patch_size)} would be"
        )
