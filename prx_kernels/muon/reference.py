"""Plain-PyTorch definition of Muon's passes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import widened


def momentum_update(
    grad: Tensor, buffer: Tensor, momentum: float, *, nesterov: bool, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """New momentum b' = b + (1 - μ)(g - b), and what is orthogonalised: g + μ(b' - g) with Nesterov, else b'.

    An entry whose new momentum is not finite keeps the old one and gives NaN: it is seen, and does not stay.

    Args:
        grad, buffer: one shape, floating.
        factor: one number that the gradient is multiplied by.

    Returns:
        The new buffer and the update, both float32 (float64 where an argument is).
    """
    wide = torch.float64 if torch.float64 in (grad.dtype, buffer.dtype) else torch.float32
    g, old = grad.to(wide), buffer.to(wide)
    g = g if factor is None else g * factor.to(wide)
    new = old.lerp(g, 1 - momentum)
    update = g.lerp(new, momentum) if nesterov else new
    if _all_finite(new):
        return new, update
    finite = new.isfinite()
    return torch.where(finite, new, old), torch.where(finite, update, math.nan)


def decayed_update(
    param: Tensor, update: Tensor, lr: float | Tensor, ratio: float, weight_decay: float, scale: Tensor | None = None
) -> Tensor:
    """p(1 - lr·weight_decay) - lr·ratio·scale·update, and p where the update is not finite.

    float32 (float64 for float64); `scale` is one number, 1 if it is not given.
    """
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, u = param.to(wide), update.to(wide)
    u = u if scale is None else u * scale.to(wide)
    new = p * (1 - lr * weight_decay)
    new = new - (lr * ratio) * u if isinstance(lr, Tensor) else new.add_(u, alpha=-lr * ratio)
    return new if _all_finite(u) else torch.where(u.isfinite(), new, p)


def squares(x: Tensor) -> Tensor:
    """Sum of the squares of all entries, float32 (float64 for float64), 0-dim."""
    norm: Tensor = torch.linalg.vector_norm(widened(x))
    return norm.square()


def update_bounds(
    grad_squares: Tensor, buffer_squares: Tensor, momentum: float, *, nesterov: bool, factor: Tensor | None = None
) -> Tensor:
    """What the norm of `momentum_update`'s update cannot exceed, from sums of squares (matrices,) of its arguments.

    With Nesterov the update is (1 - μ²)·factor·g + μ²·b, else (1 - μ)·factor·g + μ·b.
    """
    kept = momentum * momentum if nesterov else momentum
    grads = grad_squares.sqrt() if factor is None else grad_squares.sqrt() * factor
    return (1 - kept) * grads + kept * buffer_squares.sqrt()


def bounding_scales(bounds: Tensor) -> Tensor:
    """Powers of two that bring norms of at most `bounds` to at most 2⁹, and to at least 2⁸ where the bound is met.

    There a matrix has no entry near the ends of float16, and neither has what Newton-Schulz makes of it: entries of at
    most 2⁹, and of about 2⁸ / √(rows·columns). A power of two changes no bit of what is rounded in between.

    Args:
        bounds: float32, not negative. Below 2⁻¹⁰⁰ they count as that; one that is not finite gives NaN.
    """
    exponents = bounds.clamp(min=2.0**-100).view(torch.int32).bitwise_and(0xFF << 23)
    scales = ((254 << 23) - exponents + (8 << 23)).view(torch.float32)  # 2^(8 - k) from 2^k, by their bits
    return torch.where(bounds.isfinite(), scales, math.nan)


# --- the same in place, as the ops do it -------------------------------------------------------------------------


def move_momentum(
    grad: Tensor,
    buffer: Tensor,
    out: Tensor | None,
    momentum: float,
    nesterov: bool,
    factor: Tensor | None,
    scale: Tensor | None,
    sums: Tensor,
) -> None:
    """`momentum_update` of one matrix; `sums` (2,) gets the squares of what is written to `out`, and of the buffer."""
    new, update = momentum_update(grad, buffer, momentum, nesterov=nesterov, factor=factor)
    update = update if scale is None else update * scale.to(update.dtype)
    buffer.copy_(new)
    if out is not None:
        out.copy_(update)
    sums[0], sums[1] = squares(update if out is None else out), squares(new)


def apply_update(
    param: Tensor,
    update: Tensor,
    lr: Tensor,
    ratio: float,
    weight_decay: float,
    scale: Tensor | None,
    copies: Sequence[Tensor],
    bad: Tensor,
) -> None:
    """`decayed_update` of one matrix; `bad` (0-dim) gets 1.0 where the first entry of the update is not finite."""
    rate = float(lr) if lr.device.type == "cpu" else lr
    param.copy_(decayed_update(param, update, rate, ratio, weight_decay, scale))
    for copy in copies:
        copy.copy_(param)
    first = update.reshape(-1)[:1].float() * (1.0 if scale is None else scale)
    bad.copy_((~first.isfinite()).sum())


def _all_finite(x: Tensor) -> bool:
    """On a CPU, where looking is cheaper than masking: whether the sum of all entries is finite. False elsewhere."""
    return x.device.type == "cpu" and math.isfinite(x.sum())
