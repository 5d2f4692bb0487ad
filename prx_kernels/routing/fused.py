"""Routing fused with its neighbours: LayerNorm + adaLN modulation behind the entry, gated residual before the exit.

`y, h, byp = enter_route_modulate(x, keep, shift, scale)` saves reading y again for the first routed block's norm;
`x = exit_route_gated(y, branch, gate, byp, keep)` saves writing and reading the last residual sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import (
    MAX_GRID_Y,
    Config,
    Table,
    alignment,
    check_no_tangent,
    check_one_device,
    custom_op,
    hint,
    jit,
    on_cpu,
    on_device,
    tl,
    tuned,
)
from . import reference
from .kernels import MERGE, as_rows
from .tokens import added, check_keep, check_routed, checked_range, cleared

# --- public ------------------------------------------------------------------------------------------------------


def enter_route_modulate(
    x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`enter_route`, and the first routed block's `h = LayerNorm(y)·(1 + scale) + shift` in the same pass.

    Args:
        x: (batch, N, C) floating, C at most 8,192.
        keep: (batch, K) int32 or int64, unique in each row.
        shift: (batch, C) or (batch, 1, C) floating; chunks of one wide projection are read in place.
        scale: as shift.
        eps: of a LayerNorm without weight and bias (DiT, https://arxiv.org/abs/2212.09748, adaLN).

    Returns:
        `y` (batch, K, C) and `byp` as `enter_route` gives them, and `h` (batch, K, C) between them, dtype of x;
        statistics and modulation in float32 (float64 for float64).

    Raises:
        TypeError: keep is not int32 or int64, or x is not floating.
        ValueError: a shape or device does not fit.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("enter_route_modulate", shift, scale)
    check_one_device(x=x, shift=shift, scale=scale)
    check_keep(x, keep)
    shift, scale = _per_sample("shift", shift, x), _per_sample("scale", scale, x)
    y, h, byp = _EnterModulate.apply(x, keep, shift, scale, eps)
    return y, h, byp


def exit_route_gated(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    """`exit_route` of the last routed block's residual sum `y + gate·branch`, which is never stored.

    Args:
        y: (batch, K, C) floating, the residual stream.
        branch: (batch, K, C), dtype of y, the output of the last branch.
        gate: (batch, C) or (batch, 1, C) floating.
        byp: (batch, N, C), dtype of y.
        keep: (batch, K) int32 or int64, unique in each row.

    Returns:
        (batch, N, C), dtype of y; the sum is formed in float32 (float64 for float64).

    Raises:
        TypeError: keep is not int32 or int64, or the dtypes differ.
        ValueError: a shape or device does not fit.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("exit_route_gated", gate)
    check_one_device(byp=byp, gate=gate)
    check_keep(byp, keep)
    check_routed(byp, y, keep)
    check_routed(byp, branch, keep)
    if not y.dtype == branch.dtype == byp.dtype:
        raise TypeError(f"y, branch and byp must have one dtype, got {y.dtype}, {branch.dtype} and {byp.dtype}")
    out: Tensor = _exit_gated(y, branch, _per_sample("gate", gate, byp), byp, keep)
    return out


def _per_sample(name: str, vector: Tensor, x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"modulated tokens must be floating, got {x.dtype}")
    shape = (x.shape[0], x.shape[-1])
    if x.ndim != 3 or tuple(vector.shape) not in (shape, (shape[0], 1, shape[1])):
        raise ValueError(f"{name} must be {shape} for tokens of shape {tuple(x.shape)}, got {tuple(vector.shape)}")
    if shape[1] > MAX_WIDTH:
        raise ValueError(f"fused routing keeps a row in registers, {MAX_WIDTH} elements at most, got {shape[1]}")
    return vector.reshape(shape)


class _EnterModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, h = _enter_modulate(x, keep, shift, scale, eps)
        ctx.save_for_backward(keep, y, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return y, h, x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_byp: Tensor
    ) -> tuple[Tensor, None, Tensor, Tensor, None]:
        keep, y, scale = ctx.saved_tensors
        rows, grad_shift, grad_scale = _modulate_backward(grad_y, grad_h, y, scale, ctx.eps)
        return added(grad_byp, rows, keep), None, grad_shift.to(ctx.shift_dtype), grad_scale, None


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _modulate_kernel(  # type: ignore[no-untyped-def]
    y_ptr, h_ptr, x_ptr, keep_ptr, shift_ptr, scale_ptr, tokens, kept, width, x_batch, x_token, shift_batch,
    scale_batch, eps, ALIGN: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One kept row a program: copy it to y, and its normalised and modulated form to h."""
    width, x_batch, x_token = hint(width, ALIGN), hint(x_batch, ALIGN), hint(x_token, ALIGN)
    row = tl.program_id(0).to(tl.int64)
    batch = row // kept
    cols = tl.arange(0, COLS)
    mask = cols < width
    index = tl.load(keep_ptr + row).to(tl.int64)
    inside = cols < tl.where((index >= 0) & (index < tokens), width, 0)
    values = tl.load(x_ptr + batch * x_batch + index * x_token + cols, mask=inside, other=float("nan"))
    values = tl.where(mask, values, 0.0)
    tl.store(y_ptr + row * width + cols, values, mask=mask)
    normed = _normalise(values.to(ACC), mask, width, eps)[0]
    shift = tl.load(shift_ptr + batch * hint(shift_batch, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    scale = tl.load(scale_ptr + batch * hint(scale_batch, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    h = normed * (1 + scale) + shift
    tl.store(h_ptr + row * width + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _normalise(values, mask, width, eps):  # type: ignore[no-untyped-def]
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, rstd


@jit
def _modulate_backward_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, shift_part_ptr, scale_part_ptr, grad_y_ptr, grad_h_ptr, y_ptr, scale_ptr, kept, width, scale_batch, eps,
    ALIGN: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (b, s) takes rows s, s + splits, … of sample b; its sums over rows go to one row of the partial sums."""
    width = hint(width, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    splits = tl.num_programs(1)
    cols = tl.arange(0, COLS)
    mask = cols < width
    factor = 1 + tl.load(scale_ptr + batch * hint(scale_batch, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    shift_sum = tl.zeros((COLS,), ACC)
    scale_sum = tl.zeros((COLS,), ACC)
    for k in range(tl.program_id(1), kept, splits):
        place = (batch * kept + k) * width + cols
        normed, rstd = _normalise(tl.load(y_ptr + place, mask=mask, other=0.0).to(ACC), mask, width, eps)
        grad_h = tl.load(grad_h_ptr + place, mask=mask, other=0.0).to(ACC)
        shift_sum += grad_h
        scale_sum += grad_h * normed
        grad = grad_h * factor
        grad -= tl.sum(grad, axis=0) / width + normed * (tl.sum(grad * normed, axis=0) / width)
        grad = grad * rstd + tl.load(grad_y_ptr + place, mask=mask, other=0.0).to(ACC)
        tl.store(rows_ptr + place, grad.to(rows_ptr.dtype.element_ty), mask=mask)
    part = (batch * splits + tl.program_id(1)) * width + cols
    tl.store(shift_part_ptr + part, shift_sum, mask=mask)
    tl.store(scale_part_ptr + part, scale_sum, mask=mask)


@jit
def _gated_merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr, y_ptr, branch_ptr, gate_ptr, byp_ptr, keep_ptr, tokens, kept, width, byp_batch, byp_token, gate_batch,
    ALIGN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Write all rows of out once: y + gate·branch at `keep`, byp elsewhere; see `_merge_kernel` for the search."""
    width, byp_batch, byp_token = hint(width, ALIGN), hint(byp_batch, ALIGN), hint(byp_token, ALIGN)
    tiles = tl.cdiv(tokens, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    source = tl.full((ROWS,), -1, tl.int32)
    for first in range(0, kept, SCAN):
        k = first + tl.arange(0, SCAN)
        index = tl.load(keep_ptr + batch * kept + k, mask=k < kept, other=-1)
        source = tl.maximum(source, tl.max(tl.where(index[None, :] == rows[:, None], k[None, :], -1), axis=1))
    is_kept = (source >= 0)[:, None]
    inside = (rows < tokens)[:, None]
    kept_rows = (batch * kept + source.to(tl.int64)[:, None]) * width
    byp_rows = byp_ptr + batch * byp_batch + rows.to(tl.int64)[:, None] * byp_token
    out_rows = out_ptr + (batch * tokens + rows[:, None]) * width
    for first in range(0, width, COLS):
        cols = (first + tl.arange(0, COLS))[None, :]
        mask = inside & (cols < width)
        gate = tl.load(gate_ptr + batch * hint(gate_batch, ALIGN) + cols, mask=cols < width, other=0.0).to(ACC)
        y = tl.load(y_ptr + kept_rows + cols, mask=mask & is_kept, other=0.0).to(ACC)
        branch = tl.load(branch_ptr + kept_rows + cols, mask=mask & is_kept, other=0.0).to(ACC)
        bypassed = tl.load(byp_rows + cols, mask=mask & (is_kept == 0), other=0.0)
        values = tl.where(is_kept, (y + gate * branch).to(out_ptr.dtype.element_ty), bypassed)
        tl.store(out_rows + cols, values, mask=mask)


@jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    grad_y_ptr, grad_branch_ptr, gate_part_ptr, grad_ptr, branch_ptr, gate_ptr, keep_ptr, tokens, kept, width,
    grad_batch, grad_token, gate_batch, ALIGN: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows as in `_modulate_backward_kernel`: grad_y = grad[keep], grad_branch = gate·grad_y, sums of grad_y·branch."""
    width, grad_batch, grad_token = hint(width, ALIGN), hint(grad_batch, ALIGN), hint(grad_token, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    splits = tl.num_programs(1)
    cols = tl.arange(0, COLS)
    mask = cols < width
    gate = tl.load(gate_ptr + batch * hint(gate_batch, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    gate_sum = tl.zeros((COLS,), ACC)
    for k in range(tl.program_id(1), kept, splits):
        place = (batch * kept + k) * width + cols
        index = tl.load(keep_ptr + batch * kept + k).to(tl.int64)
        inside = cols < tl.where((index >= 0) & (index < tokens), width, 0)
        values = tl.load(grad_ptr + batch * grad_batch + index * grad_token + cols, mask=inside, other=0.0)
        tl.store(grad_y_ptr + place, values, mask=mask)
        grad = values.to(ACC)
        gate_sum += grad * tl.load(branch_ptr + place, mask=mask, other=0.0).to(ACC)
        tl.store(grad_branch_ptr + place, (grad * gate).to(grad_branch_ptr.dtype.element_ty), mask=mask)
    tl.store(gate_part_ptr + (batch * splits + tl.program_id(1)) * width + cols, gate_sum, mask=mask)


# --- launchers ---------------------------------------------------------------------------------------------------

# Keyed on C: a program holds one whole row, 8 elements of it a thread (one 16-byte access in bf16), or 16 at most.
_WIDE_ROW = Config((("COLS", 8192),), num_warps=16)
_UP_TO_2048 = tuple((cols, Config((("COLS", cols),), num_warps=cols // 256)) for cols in (512, 1024, 2048))
ROW: Table = {0: (*_UP_TO_2048, (4096, Config((("COLS", 4096),), num_warps=16)), (8192, _WIDE_ROW))}
# The backward of the norm spills 8 bytes on sm_90 in float32 with 16 warps.
ROW_BACKWARD: Table = {0: (*_UP_TO_2048, (4096, Config((("COLS", 4096),), num_warps=8)), (8192, _WIDE_ROW))}
MAX_WIDTH = ROW[0][-1][0]
_ROWS_A_SPLIT = 8  # rows that share one partial sum, whose traffic is then 1/8 of one tensor in bf16 at most


def launch_enter_modulate(x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, h = (torch.empty((*keep.shape, x.shape[2]), dtype=x.dtype, device=x.device) for _ in range(2))
    x, keep, shift, scale = as_rows(x), keep.contiguous(), _dense(shift), _dense(scale)
    if y.numel():
        sizes = (x.shape[2], x.stride(0), x.stride(1), shift.stride(0), scale.stride(0))
        with on_device(x):
            _modulate_kernel[(keep.numel(),)](
                y, h, x, keep, shift, scale, x.shape[1], keep.shape[1], *sizes, eps,
                ALIGN=alignment(*sizes), ACC=_accumulator(x), **tuned(ROW, sizes[0], x.device).options,
            )  # fmt: skip
    return y, h


def launch_modulate_backward(
    grad_y: Tensor, grad_h: Tensor, y: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, grad_h, y, scale = grad_y.contiguous(), grad_h.contiguous(), y.contiguous(), _dense(scale)
    rows = torch.empty_like(y)
    shift_part, scale_part = _partial(y), _partial(y)
    batch, kept, width = y.shape
    config = tuned(ROW_BACKWARD, width, y.device)
    if y.numel():
        with on_device(y):
            _modulate_backward_kernel[(batch, shift_part.shape[1])](
                rows, shift_part, scale_part, grad_y, grad_h, y, scale, kept, width, scale.stride(0), eps,
                ALIGN=alignment(width, scale.stride(0)), ACC=_accumulator(y), **config.options,
            )  # fmt: skip
    return rows, shift_part.sum(1), scale_part.sum(1).to(scale.dtype)


def launch_exit_gated(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    y, branch, gate, byp, keep = y.contiguous(), branch.contiguous(), _dense(gate), as_rows(byp), keep.contiguous()
    batch, tokens, width = byp.shape
    out = torch.empty((batch, tokens, width), dtype=byp.dtype, device=byp.device)
    if out.numel():
        config = tuned(MERGE, out.element_size(), out.device)
        sizes = (width, byp.stride(0), byp.stride(1), gate.stride(0))
        with on_device(out):
            _gated_merge_kernel[(batch * -(-tokens // config.options["ROWS"]),)](
                out, y, branch, gate, byp, keep, tokens, keep.shape[1], *sizes,
                ALIGN=alignment(*sizes), ACC=_accumulator(out), **config.options,
            )  # fmt: skip
    return out


def launch_gate_backward(grad: Tensor, branch: Tensor, gate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad, branch, gate, keep = as_rows(grad), branch.contiguous(), _dense(gate), keep.contiguous()
    grad_y, grad_branch, part = torch.empty_like(branch), torch.empty_like(branch), _partial(branch)
    batch, kept, width = branch.shape
    if branch.numel():
        sizes = (width, grad.stride(0), grad.stride(1), gate.stride(0))
        with on_device(grad):
            _gate_backward_kernel[(batch, part.shape[1])](
                grad_y, grad_branch, part, grad, branch, gate, keep, grad.shape[1], kept, *sizes,
                ALIGN=alignment(*sizes), ACC=_accumulator(grad), **tuned(ROW, width, grad.device).options,
            )  # fmt: skip
    return grad_y, grad_branch, part.sum(1).to(gate.dtype)


def _dense(vector: Tensor) -> Tensor:
    return vector if vector.stride(1) == 1 else vector.contiguous()


def _accumulator(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _partial(rows: Tensor) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    splits = min(-(-rows.shape[1] // _ROWS_A_SPLIT), MAX_GRID_Y)
    shape = (rows.shape[0], splits, rows.shape[2])
    return torch.empty(shape, dtype=dtype, device=rows.device)


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("enter_route_modulate")
def _enter_modulate(x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return launch_enter_modulate(x, keep, shift, scale, eps)


@on_cpu(_enter_modulate)
def _(x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, h, _ = reference.enter_route_modulate(x, checked_range(keep, x.shape[1]), shift, scale, eps=eps)
    return y, h


@_enter_modulate.register_fake
def _(x: Tensor, keep: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    shape = (*keep.shape, x.shape[2])
    return x.new_empty(shape), x.new_empty(shape)


@custom_op("modulate_backward")
def _modulate_backward(
    grad_y: Tensor, grad_h: Tensor, y: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_modulate_backward(grad_y, grad_h, y, scale, eps)


@on_cpu(_modulate_backward)
def _(grad_y: Tensor, grad_h: Tensor, y: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.modulate_backward(grad_y, grad_h, y, scale, eps=eps)


@_modulate_backward.register_fake
def _(grad_y: Tensor, grad_h: Tensor, y: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    accumulator = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty(y.shape), scale.new_empty(scale.shape, dtype=accumulator), scale.new_empty(scale.shape)


@custom_op("exit_route_gated")
def _exit_gated(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    return launch_exit_gated(y, branch, gate, byp, keep)


@on_cpu(_exit_gated)
def _(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    return reference.exit_route_gated(y, branch, gate, byp, checked_range(keep, byp.shape[1])).contiguous()


@_exit_gated.register_fake
def _(y: Tensor, branch: Tensor, gate: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    return byp.new_empty(byp.shape)


@custom_op("gate_backward")
def _gate_backward(grad: Tensor, branch: Tensor, gate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return launch_gate_backward(grad, branch, gate, keep)


@on_cpu(_gate_backward)
def _(grad: Tensor, branch: Tensor, gate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.gate_backward(grad, branch, gate, keep)


@_gate_backward.register_fake
def _(grad: Tensor, branch: Tensor, gate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return branch.new_empty(branch.shape), branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _save_gated(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, branch, gate, _, keep = inputs
    ctx.save_for_backward(branch, gate, keep)


def _exit_gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    branch, gate, keep = ctx.saved_tensors
    grad_y, grad_branch, grad_gate = _gate_backward(grad, branch, gate, keep)
    return grad_y, grad_branch, grad_gate, (cleared(grad, keep) if ctx.needs_input_grad[3] else None), None


_exit_gated.register_autograd(_exit_gated_backward, setup_context=_save_gated)
