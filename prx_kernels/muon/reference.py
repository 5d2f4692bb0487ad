"""Plain-PyTorch definition of Muon's two elementwise passes."""

import math

import torch
from torch import Tensor


def momentum_update(grad: Tensor, buffer: Tensor, momentum: float, *, nesterov: bool) -> tuple[Tensor, Tensor]:
    """New momentum b' = b + (1 - μ)(g - b), and what is orthogonalised: g + μ(b' - g) with Nesterov, else b'.

    An entry whose new momentum is not finite keeps the old one and gives NaN: it is seen, and does not stay.

    Args:
        grad, buffer: one shape, floating.

    Returns:
        The new buffer and the update, both float32 (float64 where an argument is).
    """
    wide = torch.float64 if torch.float64 in (grad.dtype, buffer.dtype) else torch.float32
    g, old = grad.to(wide), buffer.to(wide)
    new = old.lerp(g, 1 - momentum)
    update = g.lerp(new, momentum) if nesterov else new
    if _all_finite(new):
        return new, update
    finite = new.isfinite()
    return torch.where(finite, new, old), torch.where(finite, update, math.nan)


def decayed_update(param: Tensor, update: Tensor, lr: float, ratio: float, weight_decay: float) -> Tensor:
    """p(1 - lr·weight_decay) - lr·ratio·update, and p where the update is not finite; float32 (float64 for float64)."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, u = param.to(wide), update.to(wide)
    new = (p * (1 - lr * weight_decay)).add_(u, alpha=-lr * ratio)
    return new if _all_finite(u) else torch.where(u.isfinite(), new, p)


def _all_finite(x: Tensor) -> bool:
    """On a CPU, where looking is cheaper than masking: whether the sum of all entries is finite. False elsewhere."""
    return x.device.type == "cpu" and math.isfinite(x.sum())
