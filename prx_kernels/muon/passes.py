"""Muon's two passes over its state as ops on lists of matrices: momentum before Newton-Schulz, the update after it.

`momentum_update` moves the momentum and writes what is orthogonalised, cast, in the same pass; `apply_update` decays
the weights and takes the update off them in one pass. No host synchronisation, and nothing that is not finite is kept.
"""

from __future__ import annotations

from torch import Tensor

from ..launch import custom_op
from . import kernels, reference

# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("momentum_update", mutates=("buffers", "outs"))
def momentum_update(
    grads: list[Tensor], buffers: list[Tensor], outs: list[Tensor], momentum: float, nesterov: bool
) -> None:
    """`reference.momentum_update` for every matrix, the momentum in place and the update written to `outs`.

    Args:
        grads, buffers, outs: of one shape each, position by position, any floating dtypes; counted in float32.
            Without `outs` ([]) only the momentum moves.
        momentum: in [0, 1].
    """
    kernels.launch_momentum(grads, buffers, outs, momentum, nesterov)


@momentum_update.register_kernel("cpu")
def _(grads: list[Tensor], buffers: list[Tensor], outs: list[Tensor], momentum: float, nesterov: bool) -> None:
    for i, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        new, update = reference.momentum_update(grad, buffer, momentum, nesterov=nesterov)
        buffer.copy_(new)
        if outs:
            outs[i].copy_(update)


@momentum_update.register_fake
def _(grads: list[Tensor], buffers: list[Tensor], outs: list[Tensor], momentum: float, nesterov: bool) -> None:
    return None


@custom_op("apply_update", mutates=("params",))
def apply_update(
    params: list[Tensor], updates: list[Tensor], ratios: list[float], lr: Tensor, weight_decay: float
) -> None:
    """`reference.decayed_update` for every matrix, in place.

    Args:
        params, updates: of one shape each, position by position, floating; counted in float32.
        ratios: by which the learning rate of each matrix is multiplied.
        lr: one number on the device of the weights.
    """
    kernels.launch_apply(params, updates, ratios, lr, weight_decay)


@apply_update.register_kernel("cpu")
def _(params: list[Tensor], updates: list[Tensor], ratios: list[float], lr: Tensor, weight_decay: float) -> None:
    rate = float(lr)
    for param, update, ratio in zip(params, updates, ratios, strict=True):
        param.copy_(reference.decayed_update(param, update, rate, ratio, weight_decay))


@apply_update.register_fake
def _(params: list[Tensor], updates: list[Tensor], ratios: list[float], lr: Tensor, weight_decay: float) -> None:
    return None
