"""Muon's passes over lists of tensors as ops: sums of squares, momentum before Newton-Schulz, the update after it.

`momentum_update` moves the momentum and writes what is orthogonalised, cast, in the same pass, and tells its norm;
`apply_update` decays the weights, takes the update off them and keeps a copy of them up to date in one pass. No host
synchronisation, and nothing that is not finite is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import custom_op, on_cpu
from . import kernels, reference

# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("square_sums")
def square_sums(tensors: list[Tensor], counts: list[int]) -> Tensor:
    """Sums of squares, (len(counts),): float32, or float64 where a tensor is.

    Args:
        tensors: of any shapes, floating, at least one.
        counts: how many that follow one another are added up. Where these are more than one, all are of one dtype.
    """
    out = _sums(tensors, counts)
    kernels.launch_squares(tensors, counts, out)
    return out


@on_cpu(square_sums)
def _(tensors: list[Tensor], counts: list[int]) -> Tensor:
    out, at = _sums(tensors, counts).zero_(), 0
    for i, count in enumerate(counts):
        for x in tensors[at : at + count]:
            out[i] += reference.squares(x)
        at += count
    return out


@square_sums.register_fake
def _(tensors: list[Tensor], counts: list[int]) -> Tensor:
    return _sums(tensors, counts)


@custom_op("scaled_copy", mutates=("outs",))
def scaled_copy(sources: list[Tensor], outs: list[Tensor], counts: list[int], scales: Tensor) -> Tensor:
    """`out = scale·source`, formed in float32 and rounded once to the dtype of `out`.

    Args:
        sources: of any sizes and one floating dtype.
        outs: as many, contiguous, of the same sizes and another or the same dtype.
        counts: how many that follow one another share a scale: the parts of one matrix.
        scales: float32 (len(counts),).

    Returns:
        float32 (len(counts),): sums of the squares of what has been written.
    """
    squares = torch.empty_like(scales)
    kernels.launch_copy(sources, outs, counts, scales, squares)
    return squares


@on_cpu(scaled_copy)
def _(sources: list[Tensor], outs: list[Tensor], counts: list[int], scales: Tensor) -> Tensor:
    squares, at = torch.empty_like(scales), 0
    for i, count in enumerate(counts):
        for source, out in zip(sources[at : at + count], outs[at : at + count], strict=True):
            out.copy_(source.float() * scales[i])
        # Of the whole, so that in how many parts it came does not change a bit.
        squares[i] = reference.squares(torch.cat([out.reshape(-1) for out in outs[at : at + count]] or [scales[:0]]))
        at += count
    return squares


@scaled_copy.register_fake
def _(sources: list[Tensor], outs: list[Tensor], counts: list[int], scales: Tensor) -> Tensor:
    return torch.empty_like(scales)


@custom_op("momentum_scales")
def momentum_scales(
    grad_squares: Tensor, buffer_squares: Tensor, momentum: float, nesterov: bool, factor: Tensor | None = None
) -> Tensor:
    """`reference.bounding_scales` of what `momentum_update` will write.

    Args:
        grad_squares, buffer_squares: (matrices,), sums of squares of the gradients and of the momentum before it moves.
        momentum, nesterov, factor: as `momentum_update` will get them.

    Returns:
        float32 (matrices,).
    """
    return kernels.launch_scales(grad_squares.float(), buffer_squares.float(), momentum, nesterov, factor)


@on_cpu(momentum_scales)
def _(
    grad_squares: Tensor, buffer_squares: Tensor, momentum: float, nesterov: bool, factor: Tensor | None = None
) -> Tensor:
    bounds = reference.update_bounds(grad_squares, buffer_squares, momentum, nesterov=nesterov, factor=factor)
    return reference.bounding_scales(bounds.float())


@momentum_scales.register_fake
def _(
    grad_squares: Tensor, buffer_squares: Tensor, momentum: float, nesterov: bool, factor: Tensor | None = None
) -> Tensor:
    return torch.empty(grad_squares.shape, dtype=torch.float32, device=grad_squares.device)


@custom_op("momentum_update", mutates=("buffers", "outs"))
def momentum_update(
    grads: list[Tensor],
    buffers: list[Tensor],
    outs: list[Tensor],
    momentum: float,
    nesterov: bool,
    factor: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """`reference.momentum_update` for every matrix, the momentum in place and the update written to `outs`.

    Args:
        grads, buffers, outs: of one shape each, position by position, any floating dtypes; counted in float32.
            Without `outs` ([]) only the momentum moves.
        momentum: in [0, 1].
        factor: one number on the device that gradients are multiplied by: what clipping asks for.
        scales: float32 (matrices,), what is written to `outs` is multiplied by it, in float32 before it is rounded.

    Returns:
        Sums of squares (2, matrices), float32 (float64 where a buffer is): of what `outs` has got,
        and of the new momentum. The first are of no meaning without `outs`.
    """
    squares = _two_sums(buffers)
    kernels.launch_momentum(grads, buffers, outs, momentum, nesterov, factor, scales, squares)
    return squares


@on_cpu(momentum_update)
def _(
    grads: list[Tensor],
    buffers: list[Tensor],
    outs: list[Tensor],
    momentum: float,
    nesterov: bool,
    factor: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    squares = _two_sums(buffers)
    for i, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        scale = None if scales is None else scales[i]
        reference.move_momentum(
            grad, buffer, outs[i] if outs else None, momentum, nesterov, factor, scale, squares[:, i]
        )
    return squares


@momentum_update.register_fake
def _(
    grads: list[Tensor],
    buffers: list[Tensor],
    outs: list[Tensor],
    momentum: float,
    nesterov: bool,
    factor: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    return _two_sums(buffers)


@custom_op("apply_update", mutates=("params", "copies"))
def apply_update(
    params: list[Tensor],
    updates: list[Tensor],
    copies: list[Tensor],
    ratios: list[float],
    lr: Tensor,
    weight_decay: float,
    scales: Tensor | None = None,
) -> Tensor:
    """`reference.decayed_update` for every matrix, in place.

    Args:
        params, updates, copies: of one shape each, position by position, any floating dtypes; counted in float32.
            A copy gets the new weight, rounded; there are none of them ([]) or all.
        ratios: by which the learning rate of each matrix is multiplied.
        lr: one number on the device of the weights.
        scales: float32 (matrices,), by which the updates are multiplied.

    Returns:
        float32 (matrices,): 1.0 where the first entry of an update is not finite, else 0.0.
    """
    bad = _one_each(params)
    kernels.launch_apply(params, updates, copies, ratios, lr, weight_decay, scales, bad)
    return bad


@on_cpu(apply_update)
def _(
    params: list[Tensor],
    updates: list[Tensor],
    copies: list[Tensor],
    ratios: list[float],
    lr: Tensor,
    weight_decay: float,
    scales: Tensor | None = None,
) -> Tensor:
    bad = _one_each(params)
    for i, (param, update, ratio) in enumerate(zip(params, updates, ratios, strict=True)):
        scale = None if scales is None else scales[i]
        reference.apply_update(param, update, lr, ratio, weight_decay, scale, copies[i : i + 1], bad[i])
    return bad


@apply_update.register_fake
def _(
    params: list[Tensor],
    updates: list[Tensor],
    copies: list[Tensor],
    ratios: list[float],
    lr: Tensor,
    weight_decay: float,
    scales: Tensor | None = None,
) -> Tensor:
    return _one_each(params)


# --- results -----------------------------------------------------------------------------------------------------


def _wide(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _sums(tensors: list[Tensor], counts: list[int]) -> Tensor:
    return torch.empty(len(counts), dtype=_wide(tensors), device=tensors[0].device)


def _two_sums(buffers: list[Tensor]) -> Tensor:
    return torch.empty((2, len(buffers)), dtype=_wide(buffers), device=buffers[0].device)


def _one_each(params: list[Tensor]) -> Tensor:
    return torch.empty(len(params), dtype=torch.float32, device=params[0].device)
