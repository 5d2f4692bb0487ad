"""The pixel end of an x-predicting transformer: tokens back to an image, and the loss without noise or velocity."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import check_no_tangent, custom_op, on_cpu
from . import kernels, reference

# --- public ------------------------------------------------------------------------------------------------------
# `patchify` and `unpatchify` are plain PyTorch: a permuting copy is one pass already, and a view to the compiler.


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut (batch, channels, H, W) into (batch, H/p·W/p, channels·p²), features in the order (channel, row, column).

    Raises:
        ValueError: no picture, or its size is not a multiple of the patch.
    """
    if image.ndim != 4:
        raise ValueError(f"image must be (batch, channels, H, W), got shape {tuple(image.shape)}")
    check_size(image.shape[2], image.shape[3], patch_size)
    return reference.patchify(image, patch_size)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches back in place: (batch, H/p·W/p, channels·p²) -> (batch, channels, H, W), dtype kept.

    Features of a token are in the order (channel, row, column).

    Raises:
        ValueError: the size is not a multiple of the patch, or the token or feature count does not fit.
    """
    check_size(height, width, patch_size)
    count = (height // patch_size) * (width // patch_size)
    if tokens.shape[1] != count or tokens.shape[2] % patch_size**2:
        raise ValueError(
            f"{height}x{width} in patches of {patch_size} needs {count} tokens of channels·{patch_size**2} features, "
            f"got {tuple(tokens.shape[1:])}"
        )
    return reference.unpatchify(tokens, patch_size, height, width)


@overload
def x_prediction_loss(
    tokens: Tensor,
    image: Tensor,
    t: Tensor,
    patch_size: int,
    *,
    t_min: float = 0.05,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor: ...


@overload
def x_prediction_loss(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, *, t_min: float = 0.05, reduction: Literal["both"]
) -> tuple[Tensor, Tensor]: ...


def x_prediction_loss(
    tokens: Tensor,
    image: Tensor,
    t: Tensor,
    patch_size: int,
    *,
    t_min: float = 0.05,
    reduction: Literal["mean", "none", "both"] = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Flow-matching loss of an x0 prediction: `mean((x0_hat - x0)² / max(t, t_min)²)`.

    With `t_c = max(t, t_min)` in the velocity of target and prediction the noise drops out (docs/recipe.md,
    "Objective").

    One pass over tokens and pixels gives the loss and its gradient by tokens, which is all that is kept for the
    backward: 8 bytes a value (bfloat16 tokens, float32 pixels; read both, write the gradient) against 14 where the
    backward reads both again. There the gradient is multiplied by the incoming one, in place where the graph is freed
    behind; a loss that is itself the scalar differentiated costs no traffic. A factor other than a power of two rounds
    once more.

    Args:
        tokens: (batch, N, channels·p²) floating, the predicted x0 in patches of order (channel, row, column).
        image: (batch, channels, H, W) floating, the clean picture in [-1, 1], or uint8, which is scaled to it; any
            strides.
        t: (batch,) float32 in [0, 1]; 0 is the clean picture.
        patch_size: p; H and W are multiples of it.
        t_min: lower clamp of t.
        reduction: "mean" gives a scalar, "none" one loss a sample. "both" gives the mean and, without a gradient, the
            losses that it is the mean of: to look at them costs nothing.

    Returns:
        float32 scalar, (batch,), or both; float64 for float64 tokens. Differences and sums are formed in that dtype.

    A gradient by image or t, where one is asked for, and float64 on a GPU, take the plain PyTorch path. There is none
    to second order otherwise.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown reduction, or a negative t_min.
        TypeError: tokens or t that are not floating, or an image that is neither floating nor uint8.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("x_prediction_loss", tokens, image, t)
    _check_loss(tokens, image, t, patch_size, t_min, reduction)
    if torch.is_grad_enabled() and (image.requires_grad or t.requires_grad):
        per_sample = reference.x_prediction_loss(tokens, image, t, patch_size, t_min=t_min)
    elif torch.is_grad_enabled() and tokens.requires_grad:
        mean, per_sample = _XPredictionLoss.apply(tokens, image, t, patch_size, t_min, reduction != "none")
        results: dict[str, Any] = {"mean": mean, "none": per_sample, "both": (mean, per_sample)}
        chosen: Tensor | tuple[Tensor, Tensor] = results[reduction]
        return chosen
    else:
        per_sample = _loss(tokens, image, t, patch_size, t_min)
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else (per_sample.mean(), per_sample.detach())


def _check_loss(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, reduction: str) -> None:
    if image.ndim != 4:
        raise ValueError(f"image must be (batch, channels, H, W), got shape {tuple(image.shape)}")
    batch, channels, height, width = image.shape
    check_size(height, width, patch_size)
    expected = (batch, (height // patch_size) * (width // patch_size), channels * patch_size**2)
    if tuple(tokens.shape) != expected or tuple(t.shape) != (batch,):
        raise ValueError(
            f"for an image of shape {tuple(image.shape)} tokens must be {expected} and t ({batch},), "
            f"got {tuple(tokens.shape)} and {tuple(t.shape)}"
        )
    if not tokens.device == image.device == t.device:
        raise ValueError(
            f"tokens, image and t must lie on one device, got {tokens.device}, {image.device} and {t.device}"
        )
    if reduction not in ("mean", "none", "both"):
        raise ValueError(f'reduction must be "mean", "none" or "both", got {reduction!r}')
    if not t_min >= 0:
        raise ValueError(f"t_min must not be negative, got {t_min}")
    if not t.is_floating_point():
        raise TypeError(f"t must be floating, got {t.dtype}")
    if not tokens.is_floating_point() or not (image.is_floating_point() or image.dtype == torch.uint8):
        raise TypeError(f"tokens must be floating and image floating or uint8, got {tokens.dtype} and {image.dtype}")


def check_size(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if height % patch_size or width % patch_size:
        lower = (height // patch_size * patch_size, width // patch_size * patch_size)
        raise ValueError(
            f"image size {height}x{width} is not a multiple of the patch size {patch_size}; "
            f"{max(lower[0], patch_size)}x{max(lower[1], patch_size)} would be"
        )


class _XPredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """The mean and the loss of each sample; the gradient is that of the one that `mean` names."""
        elements = tokens.shape[1] * tokens.shape[2] * (tokens.shape[0] if mean else 1)
        unit = 2.0 / max(elements, 1)
        # float16 has no room for numbers of 1/elements: it keeps 2·error/max(t, t_min)², and the backward the rest.
        ctx.unit = unit / 2 if tokens.dtype == torch.float16 else 1.0
        per_sample, gradient = _loss_and_gradient(tokens, image, t, patch_size, t_min, unit / ctx.unit)
        ctx.save_for_backward(gradient)
        ctx.mean, loss = mean, per_sample.mean()
        ctx.mark_non_differentiable(per_sample if mean else loss)
        return loss, per_sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_mean: Tensor, for_samples: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scaled_gradient(gradient, for_mean if ctx.mean else for_samples, ctx.unit), *(None,) * 5


def scaled_gradient(gradient: Tensor, factor: Tensor, unit: float) -> Tensor:
    """gradient·factor·unit; in place where nobody can read the saved gradient again."""
    if torch.compiler.is_compiling():
        return _plain_scale(gradient, factor, unit)  # the compiler fuses it with what reads it
    # Whether the backward that runs now keeps its graph for another one. torch says so by a private name only.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps_graph is None or keeps_graph():
        scaled: Tensor = _scale(gradient, factor, unit)
        return scaled
    _scale_(gradient, factor, unit)
    return gradient


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("x_prediction_loss")
def _loss(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float) -> Tensor:
    if tokens.dtype == torch.float64:
        return reference.x_prediction_loss(tokens, image, t, patch_size, t_min=t_min)
    return kernels.loss(tokens, image, t, patch_size, t_min, None, 0.0)


@on_cpu(_loss)
def _(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float) -> Tensor:
    return reference.x_prediction_loss(tokens, image, t, patch_size, t_min=t_min)


@_loss.register_fake
def _(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float) -> Tensor:
    return tokens.new_empty(tokens.shape[0], dtype=_accumulator(tokens))


@custom_op("x_prediction_loss_gradient")
def _loss_and_gradient(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, unit: float
) -> tuple[Tensor, Tensor]:
    if tokens.dtype == torch.float64:
        return _plain_loss_and_gradient(tokens, image, t, patch_size, t_min, unit)
    gradient = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    return kernels.loss(tokens, image, t, patch_size, t_min, gradient, unit), gradient


def _plain_loss_and_gradient(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, unit: float
) -> tuple[Tensor, Tensor]:
    losses, gradient = reference.x_prediction_loss_gradient(tokens, image, t, patch_size, t_min, unit)
    return losses, gradient.contiguous()


on_cpu(_loss_and_gradient)(_plain_loss_and_gradient)


@_loss_and_gradient.register_fake
def _(tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, unit: float) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape[0], dtype=_accumulator(tokens)), tokens.new_empty(tokens.shape)


@custom_op("scale_samples")
def _scale(x: Tensor, factor: Tensor, unit: float) -> Tensor:
    return _plain_scale(x, factor, unit) if x.dtype == torch.float64 else kernels.scale(x, factor, unit, in_place=False)


@on_cpu(_scale)
def _(x: Tensor, factor: Tensor, unit: float) -> Tensor:
    return _plain_scale(x, factor, unit)


@_scale.register_fake
def _(x: Tensor, factor: Tensor, unit: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("scale_samples_", mutates=("x",))
def _scale_(x: Tensor, factor: Tensor, unit: float) -> None:
    if x.dtype == torch.float64:
        x.copy_(_plain_scale(x, factor, unit))
    else:
        kernels.scale(x, factor, unit, in_place=True)


@on_cpu(_scale_)
def _(x: Tensor, factor: Tensor, unit: float) -> None:
    if unit != 1.0 or not bool((factor == 1).all()):
        x.copy_(_plain_scale(x, factor, unit))


@_scale_.register_fake
def _(x: Tensor, factor: Tensor, unit: float) -> None:
    return None


def _plain_scale(x: Tensor, factor: Tensor, unit: float) -> Tensor:
    factor = factor.to(_accumulator(x)) * unit
    return (x.to(_accumulator(x)) * (factor[:, None, None] if factor.ndim else factor)).to(x.dtype)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
