"""Triton kernels of Muon's passes over all matrices; the ops that use them stand in passes.py.

Each is one launch for a list of tensors, found through a table, and moves the least bytes: with float32 state and a
half-precision update 14 bytes an entry for the momentum (`torch._foreach_*`: two lerps and a cast, 30) and 10 for the
weights (two passes over them, 18 or 22), 12 with a half-precision copy of them. Sums are formed in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import Config, Table, hint, jit, on_device, tl, tuned
from . import reference
from .table import Batch, batches, numbers, together

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _tensor(table_ptr, count, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tensor of this program: the last whose first program is not behind it."""
    at = 0
    for step in tl.static_range(STEPS):
        further = at + (1 << (STEPS - 1 - step))
        first = tl.load(table_ptr + further, mask=further < count, other=1 << 40)
        at = tl.where(first <= tl.program_id(0), further, at)
    return at


@jit
def _entry(table_ptr, count, row, tensor):  # type: ignore[no-untyped-def]
    return tl.load(table_ptr + row * count + tensor)


@jit
def _squares_kernel(  # type: ignore[no-untyped-def]
    table_ptr, part_ptr, x_ptr, count,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Sum of the squares of one part of one tensor."""
    tensor = _tensor(table_ptr, count, STEPS)
    begin = (tl.program_id(0) - _entry(table_ptr, count, 0, tensor)) * (BLOCK * BLOCKS)
    size = hint(_entry(table_ptr, count, 1, tensor), ALIGN)
    x_ptr += hint(_entry(table_ptr, count, 3, tensor), ALIGN)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit
def _sum_kernel(table_ptr, part_ptr, out_ptr, count, programs, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of the parts of one tensor: program (tensor, which of several sums)."""
    tensor, which = tl.program_id(0), tl.program_id(1)
    first = tl.load(table_ptr + tensor)
    last = tl.load(table_ptr + tensor + 1, mask=tensor + 1 < count, other=programs)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + which * programs + at, mask=at < last, other=0.0)
    place = _entry(table_ptr, count, 2, tensor)
    tl.store(out_ptr + which * places + place, tl.sum(total, axis=0))


@jit
def _scales_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grads_ptr, buffers_ptr, factor_ptr, count, kept, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """2⁸ over the power of two of (1 - kept)·factor·√grads + kept·√buffers, by its bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grads = tl.sqrt(tl.load(grads_ptr + at, mask=at < count, other=0.0))
    if HAS_FACTOR:
        grads *= tl.load(factor_ptr).to(tl.float32)
    bounds = (1.0 - kept) * grads + kept * tl.sqrt(tl.load(buffers_ptr + at, mask=at < count, other=0.0))
    smallest = 7.888609052210118e-31  # 2⁻¹⁰⁰
    exponents = tl.where(bounds < smallest, smallest, bounds).to(tl.int32, bitcast=True) & 0x7F800000
    scales = ((254 << 23) - exponents + (8 << 23)).to(tl.float32, bitcast=True)
    tl.store(out_ptr + at, tl.where(bounds < float("inf"), scales, float("nan")), mask=at < count)


@jit
def _momentum_kernel(  # type: ignore[no-untyped-def]
    table_ptr, part_ptr, buffer_ptr, grad_ptr, out_ptr, factor_ptr, scale_ptr, count, programs, weight,
    NESTEROV: tl.constexpr, HAS_OUT: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SCALE: tl.constexpr,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """buffer += weight·(grad - buffer); out = Nesterov's look-ahead of it; of both the sum of squares of this part.

    `weight` is 1 - momentum. The gradient is multiplied by `factor`, what is written to `out` by its tensor's `scale`.
    """
    tensor = _tensor(table_ptr, count, STEPS)
    begin = (tl.program_id(0) - _entry(table_ptr, count, 0, tensor)) * (BLOCK * BLOCKS)
    size = hint(_entry(table_ptr, count, 1, tensor), ALIGN)
    buffer_ptr += hint(_entry(table_ptr, count, 3, tensor), ALIGN)
    grad_ptr += hint(_entry(table_ptr, count, 4, tensor), ALIGN)
    out_ptr += hint(_entry(table_ptr, count, 5, tensor), ALIGN) if HAS_OUT else 0
    factor = tl.load(factor_ptr).to(tl.float32) if HAS_FACTOR else 1.0
    scale = tl.load(scale_ptr + _entry(table_ptr, count, 2, tensor)) if HAS_SCALE else 1.0
    outs = tl.zeros((BLOCK,), tl.float32)
    buffers = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
        old = tl.load(buffer_ptr + at, mask=mask, other=0.0).to(tl.float32)
        new = old + weight * (grad - old)
        finite = tl.abs(new) < float("inf")  # false for NaN too
        kept = tl.where(finite, new, old)
        buffers += tl.where(mask, kept * kept, 0.0)
        tl.store(buffer_ptr + at, kept.to(buffer_ptr.dtype.element_ty), mask=mask)
        if HAS_OUT:
            update = new
            if NESTEROV:
                update = new + weight * (grad - new)
            rounded = (tl.where(finite, update, float("nan")) * scale).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, rounded, mask=mask)
            written = rounded.to(tl.float32)
            outs += tl.where(mask, written * written, 0.0)
    tl.store(part_ptr + tl.program_id(0), tl.sum(outs, axis=0))
    tl.store(part_ptr + programs + tl.program_id(0), tl.sum(buffers, axis=0))


@jit
def _copy_kernel(  # type: ignore[no-untyped-def]
    table_ptr, part_ptr, out_ptr, x_ptr, scale_ptr, count,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out = scale·x, and the sum of the squares of what this part has written."""
    tensor = _tensor(table_ptr, count, STEPS)
    begin = (tl.program_id(0) - _entry(table_ptr, count, 0, tensor)) * (BLOCK * BLOCKS)
    size = hint(_entry(table_ptr, count, 1, tensor), ALIGN)
    scale = tl.load(scale_ptr + _entry(table_ptr, count, 2, tensor))
    out_ptr += hint(_entry(table_ptr, count, 3, tensor), ALIGN)
    x_ptr += hint(_entry(table_ptr, count, 4, tensor), ALIGN)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        rounded = (x * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, rounded, mask=at < size)
        written = tl.where(at < size, rounded.to(tl.float32), 0.0)
        total += written * written
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit
def _apply_kernel(  # type: ignore[no-untyped-def]
    table_ptr, bad_ptr, param_ptr, update_ptr, copy_ptr, lr_ptr, scale_ptr, count, weight_decay,
    HAS_COPY: tl.constexpr, HAS_SCALE: tl.constexpr,
    ALIGN: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """param = param·(1 - lr·weight_decay) - lr·ratio·scale·update, but where the update is not finite.

    `copy` gets the new weight too, `bad` of each tensor whether its first update is not finite.
    """
    tensor = _tensor(table_ptr, count, STEPS)
    begin = (tl.program_id(0) - _entry(table_ptr, count, 0, tensor)) * (BLOCK * BLOCKS)
    size = hint(_entry(table_ptr, count, 1, tensor), ALIGN)
    place = _entry(table_ptr, count, 2, tensor)
    param_ptr += hint(_entry(table_ptr, count, 3, tensor), ALIGN)
    update_ptr += hint(_entry(table_ptr, count, 4, tensor), ALIGN)
    copy_ptr += hint(_entry(table_ptr, count, 5, tensor), ALIGN) if HAS_COPY else 0
    ratio = _entry(table_ptr, count, 6 if HAS_COPY else 5, tensor).to(tl.int32).to(tl.float32, bitcast=True)
    scale = tl.load(scale_ptr + place) if HAS_SCALE else 1.0
    lr = tl.load(lr_ptr).to(tl.float32)
    if begin == 0:
        first = tl.load(update_ptr).to(tl.float32) * scale
        tl.store(bad_ptr + place, tl.where(tl.abs(first) < float("inf"), 0.0, 1.0))
    for block in range(BLOCKS):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        param = tl.load(param_ptr + at, mask=mask, other=0.0)
        update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
        new = param.to(tl.float32) * (1.0 - lr * weight_decay) - (lr * ratio) * update
        kept = tl.where(tl.abs(update) < float("inf"), new.to(param_ptr.dtype.element_ty), param)
        tl.store(param_ptr + at, kept, mask=mask)
        if HAS_COPY:
            tl.store(copy_ptr + at, kept.to(copy_ptr.dtype.element_ty), mask=mask)


# --- launchers ---------------------------------------------------------------------------------------------------

# Keyed on the bytes of an element: two 16-byte loads a thread and tensor of float32, one of bf16, and 32 K elements a
# program, so that finding its tensor does not count. Not yet tuned.
_PART = Config((("BLOCK", 2048), ("BLOCKS", 16)), num_warps=8)
BLOCK: Table = {0: ((2, _PART), (4, _PART))}
SUM = 1024  # parts that are added at once


def launch_squares(tensors: Sequence[Tensor], counts: Sequence[int], out: Tensor) -> None:
    """Sums of squares of tensors, of so many together as `counts` says; float32 or float64. 0 for empty ones.

    Where `counts` holds more than ones, all are of one dtype.
    """
    of = [place for place, count in enumerate(counts) for _ in range(count)]
    launched = [_plain(x) for x in tensors]
    if not all(launched):
        out.zero_()
    for place, x, go in zip(of, tensors, launched, strict=True):
        if x.numel() and not go:
            out[place] += reference.squares(x)
    chosen = [i for i, go in enumerate(launched) if go]
    if len(of) == len(set(of)):
        found = batches([tensors[i] for i in chosen], places=[of[i] for i in chosen])
    else:
        found = together([tensors[i] for i in chosen], places=[of[i] for i in chosen])
    for batch in found:
        column = batch.columns[0]
        config = tuned(BLOCK, column[0].element_size(), out.device)
        table, programs = batch.table(config)
        parts = torch.empty(programs, dtype=torch.float32, device=out.device)
        with on_device(out):
            _squares_kernel[(programs,)](
                table, parts, column[0], len(column), ALIGN=batch.align, STEPS=batch.steps, **config.options
            )
            _sum(table, parts, batch, config, programs, out.view(1, -1))


def launch_copy(
    sources: Sequence[Tensor], outs: Sequence[Tensor], counts: Sequence[int], scales: Tensor, squares: Tensor
) -> None:
    """Write every source times its scale to its out; so many follow one another as `counts` says share a scale.

    Args:
        scales, squares: float32 (len(counts),); the sums of the squares of what is written go to `squares`.
    """
    of = [place for place, count in enumerate(counts) for _ in range(count)]
    chosen = [i for i, x in enumerate(sources) if x.numel()]
    if set(of) - {of[i] for i in chosen} or not chosen:
        squares.zero_()
    columns = [[column[i] for i in chosen] for column in (outs, sources)]
    for batch in together(*columns, places=[of[i] for i in chosen]):
        out, source = (column[0] for column in batch.columns)
        config = tuned(BLOCK, out.element_size(), out.device)
        table, programs = batch.table(config)
        parts = torch.empty(programs, dtype=torch.float32, device=out.device)
        with on_device(out):
            _copy_kernel[(programs,)](
                table, parts, out, source, scales, len(batch.places),
                ALIGN=batch.align, STEPS=batch.steps, **config.options,
            )  # fmt: skip
            _sum(table, parts, batch, config, programs, squares.view(1, -1))


def launch_scales(
    grad_squares: Tensor, buffer_squares: Tensor, momentum: float, nesterov: bool, factor: Tensor | None
) -> Tensor:
    """`reference.bounding_scales` of `reference.update_bounds`, float32 (matrices,)."""
    out = torch.empty_like(grad_squares)
    with on_device(out):
        _scales_kernel[(-(-out.numel() // SUM),)](
            out, grad_squares, buffer_squares, factor, out.numel(), momentum * momentum if nesterov else momentum,
            HAS_FACTOR=factor is not None, BLOCK=SUM,
        )  # fmt: skip
    return out


def launch_momentum(
    grads: Sequence[Tensor], buffers: Sequence[Tensor], outs: Sequence[Tensor], momentum: float, nesterov: bool,
    factor: Tensor | None = None, scales: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """Move every buffer towards its gradient; write what is to be orthogonalised to `outs`, if there are any.

    Args:
        factor: one number that the gradients are multiplied by.
        scales: float32 (tensors,), of what is written to `outs`.
        squares: (2, tensors): sums of squares of what is written and of the new buffers go there.
    """
    if squares is None:
        squares = torch.empty((2, len(grads)), dtype=torch.float32, device=buffers[0].device)
    columns = [buffers, grads, *([outs] if outs else [])]
    launched = [_plain(*tensors) for tensors in zip(*columns, strict=True)]
    if not all(launched):
        squares.zero_()
    for i, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        if buffer.numel() and not launched[i]:
            out, scale = outs[i] if outs else None, None if scales is None else scales[i]
            reference.move_momentum(grad, buffer, out, momentum, nesterov, factor, scale, squares[:, i])
    for batch in batches(*(_kept(column, launched) for column in columns)):
        first = [column[0] for column in batch.columns]
        config = tuned(BLOCK, first[0].element_size(), first[0].device)
        table, programs = batch.table(config)
        parts = torch.empty((2, programs), dtype=torch.float32, device=first[0].device)
        with on_device(first[0]):
            _momentum_kernel[(programs,)](
                table, parts, first[0], first[1], first[-1], factor, scales, len(batch.places), programs, 1 - momentum,
                NESTEROV=nesterov, HAS_OUT=len(outs) > 0, HAS_FACTOR=factor is not None, HAS_SCALE=scales is not None,
                ALIGN=batch.align, STEPS=batch.steps, **config.options,
            )  # fmt: skip
            _sum(table, parts, batch, config, programs, squares)


def launch_apply(
    params: Sequence[Tensor], updates: Sequence[Tensor], copies: Sequence[Tensor], ratios: Sequence[float], lr: Tensor,
    weight_decay: float, scales: Tensor | None = None, bad: Tensor | None = None,
) -> None:  # fmt: skip
    """Decay every weight and take lr·ratio·scale of its update off it; `lr` is one number on the device of the weights.

    Args:
        copies: of the weights, in any dtype, which get the new ones; none of them ([]) or all.
        scales: float32 (tensors,), by which updates are multiplied.
        bad: float32 (tensors,): 1.0 where the first entry of an update is not finite, else 0.0.
    """
    if bad is None:
        bad = torch.empty(len(params), dtype=torch.float32, device=params[0].device)
    updates = [u.contiguous() if p.is_contiguous() else u for p, u in zip(params, updates, strict=True)]
    columns = [params, updates, *([copies] if copies else [])]
    launched = [_plain(*tensors) for tensors in zip(*columns, strict=True)]
    if not all(launched):
        bad.zero_()
    for i, (param, update) in enumerate(zip(params, updates, strict=True)):
        if param.numel() and not launched[i]:
            scale = None if scales is None else scales[i]
            reference.apply_update(param, update, lr, ratios[i], weight_decay, scale, copies[i : i + 1], bad[i])
    for batch in batches(*(_kept(column, launched) for column in columns)):
        first = [column[0] for column in batch.columns]
        config = tuned(BLOCK, first[0].element_size(), first[0].device)
        table, programs = batch.table(config, [ratios[i] for i in batch.places])
        with on_device(first[0]):
            _apply_kernel[(programs,)](
                table, bad, first[0], first[1], first[-1], lr, scales, len(batch.places), weight_decay,
                HAS_COPY=len(copies) > 0, HAS_SCALE=scales is not None,
                ALIGN=batch.align, STEPS=batch.steps, **config.options,
            )  # fmt: skip


def _sum(table: Tensor, parts: Tensor, batch: Batch, config: Config, programs: int, out: Tensor) -> None:
    """Add up the parts of every tensor, or of neighbours that have one place, into out (sums, places)."""
    firsts = batch.firsts(config)
    starts = [i for i, place in enumerate(batch.places) if i == 0 or place != batch.places[i - 1]]
    if len(starts) < len(firsts):
        places = [batch.places[i] for i in starts]
        table = numbers((*(firsts[i] for i in starts), *[0] * len(starts), *places), parts)
    grid = (len(starts), out.shape[0])
    _sum_kernel[grid](table, parts, out, len(starts), programs, out.shape[1], BLOCK=SUM)


def _kept(column: Sequence[Tensor], launched: Sequence[bool]) -> list[Tensor]:
    """Empty tensors in the place of those that no kernel takes."""
    return [x if go else x.new_empty(0) for x, go in zip(column, launched, strict=True)]


def _plain(*tensors: Tensor) -> bool:
    """Whether there is work that the kernels, which count in float32 and know no strides, can do as the definitions."""
    return all(x.numel() and x.is_contiguous() and x.dtype != torch.float64 for x in tensors)
