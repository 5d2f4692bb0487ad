"""Triton kernels of a gated residual sum, LayerNorm and adaLN modulation, and what launches them.

A program holds one row of C numbers in registers. The backward takes several rows of one sample, one after the other,
and adds up what gate, shift and scale get.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, hint, jit, on_device, tl, tuned
from .launch import accumulator, dense_rows

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _normalise(values, mask, width, eps):  # type: ignore[no-untyped-def]
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, rstd


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    sum_ptr, h_ptr, x_ptr, branch_ptr, modulation_ptr, tokens, width, modulation_batch, eps,
    HAS_BRANCH: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row a program: the residual sum, rounded as it is stored, and its normalised and modulated form."""
    width = hint(width, ALIGN)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    mask = cols < width
    place = row * width + cols
    values = tl.load(x_ptr + place, mask=mask, other=0.0)
    vectors = modulation_ptr + (row // tokens) * hint(modulation_batch, ALIGN) + cols
    if HAS_BRANCH:
        gate = tl.load(vectors, mask=mask, other=0.0).to(ACC)
        vectors += width
        branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(ACC)
        values = (values.to(ACC) + gate * branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, values, mask=mask)
    normed = _normalise(values.to(ACC), mask, width, eps)[0]
    shift = tl.load(vectors, mask=mask, other=0.0).to(ACC)
    scale = tl.load(vectors + width, mask=mask, other=0.0).to(ACC)
    h = normed * (1 + scale) + shift
    tl.store(h_ptr + place, h.to(h_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_x_ptr, grad_branch_ptr, part_ptr, grad_sum_ptr, grad_h_ptr, again_ptr, sum_ptr, branch_ptr, modulation_ptr,
    tokens, parts, chunk, width, modulation_batch, eps,
    HAS_SUM: tl.constexpr, HAS_AGAIN: tl.constexpr, HAS_BRANCH: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Program p takes `chunk` rows of sample p // parts; its sums for the vectors are row p of the parts."""
    width = hint(width, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    batch = program // parts
    cols = tl.arange(0, COLS)
    mask = cols < width
    vectors = modulation_ptr + batch * hint(modulation_batch, ALIGN) + cols
    part_ptr += program * width * (3 if HAS_BRANCH else 2) + cols
    scale_ptr = vectors + (2 if HAS_BRANCH else 1) * width
    shift_sum = tl.zeros((COLS,), ACC)
    scale_sum = tl.zeros((COLS,), ACC)
    gate_sum = tl.zeros((COLS,), ACC)
    begin = (program % parts) * chunk
    for token in range(begin, tl.minimum(begin + chunk, tokens)):
        place = (batch * tokens + token) * width + cols
        grad_h = tl.load(grad_h_ptr + place, mask=mask, other=0.0).to(ACC)
        if HAS_AGAIN:
            grad_h += tl.load(again_ptr + place, mask=mask, other=0.0).to(ACC)
        normed, rstd = _normalise(tl.load(sum_ptr + place, mask=mask, other=0.0).to(ACC), mask, width, eps)
        shift_sum += grad_h
        scale_sum += grad_h * normed
        # Scale and gate are read for each row, as registers are few: they stay in the first cache.
        grad = grad_h * (1 + tl.load(scale_ptr, mask=mask, other=0.0).to(ACC))
        grad -= tl.sum(grad, axis=0) / width + normed * (tl.sum(grad * normed, axis=0) / width)
        grad *= rstd
        if HAS_SUM:
            grad += tl.load(grad_sum_ptr + place, mask=mask, other=0.0).to(ACC)
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if HAS_BRANCH:
            gate_sum += grad * tl.load(branch_ptr + place, mask=mask, other=0.0).to(ACC)
            gate = tl.load(vectors, mask=mask, other=0.0).to(ACC)
            tl.store(grad_branch_ptr + place, (grad * gate).to(grad_branch_ptr.dtype.element_ty), mask=mask)
    if HAS_BRANCH:
        tl.store(part_ptr, gate_sum, mask=mask)
        part_ptr += width
    tl.store(part_ptr, shift_sum, mask=mask)
    tl.store(part_ptr + width, scale_sum, mask=mask)


# --- launchers ---------------------------------------------------------------------------------------------------

# Keyed on C: 8 elements of a row a thread, one 16-byte access in bf16, or 16 at most. The backward of float32 rows of
# more than 4,096 spills 168 bytes a thread. Not yet tuned on a GPU.
_UP_TO_2048 = tuple((cols, Config((("COLS", cols),), num_warps=cols // 256)) for cols in (512, 1024, 2048))
ROW: Table = {0: (*_UP_TO_2048, *((cols, Config((("COLS", cols),), num_warps=16)) for cols in (4096, 8192)))}
MAX_WIDTH = ROW[0][-1][0]
# Programs of the backward, four a multiprocessor of Hopper: each writes a row of partial sums for every vector.
_MOST_PROGRAMS = 512


def forward(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum (x itself without a branch) and its normalised, modulated form, both dense."""
    x, modulation = x.contiguous(), dense_rows(modulation)
    h, total = torch.empty_like(x), (x if branch is None else torch.empty_like(x))
    (batch, tokens, width), step = x.shape, modulation.stride(0)
    if x.numel():
        with on_device(x):
            _forward_kernel[(batch * tokens,)](
                total, h, x, x if branch is None else branch.contiguous(), modulation, tokens, width, step, eps,
                HAS_BRANCH=branch is not None, ALIGN=alignment(width, step), ACC=accumulator(x),
                **tuned(ROW, width, x.device).options,
            )  # fmt: skip
    return total, h


def backward(
    grad_sum: Tensor | None, grad_h: Tensor, again: Tensor | None, total: Tensor, branch: Tensor | None,
    modulation: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by x and branch (empty without one), and parts of the vectors' (`reference` has the shapes)."""
    grad_h, total, modulation = grad_h.contiguous(), total.contiguous(), dense_rows(modulation)
    (batch, tokens, width), step, device = total.shape, modulation.stride(0), total.device
    grad_x = torch.empty_like(total)
    grad_branch = torch.empty((0,) if branch is None else total.shape, dtype=total.dtype, device=device)
    chunk, parts = chunks(batch, tokens)
    kind = torch.float64 if total.dtype == torch.float64 else torch.float32
    part = torch.empty((batch, parts, modulation.shape[1]), dtype=kind, device=device)
    if part.numel():
        with on_device(total):
            _backward_kernel[(batch * parts,)](
                grad_x, grad_x if branch is None else grad_branch, part,
                grad_h if grad_sum is None else grad_sum.contiguous(), grad_h,
                grad_h if again is None else again.contiguous(), total,
                total if branch is None else branch.contiguous(), modulation, tokens, parts, chunk, width, step, eps,
                HAS_SUM=grad_sum is not None, HAS_AGAIN=again is not None, HAS_BRANCH=branch is not None,
                ALIGN=alignment(width, step), ACC=accumulator(total), **tuned(ROW, width, device).options,
            )  # fmt: skip
    return grad_x, grad_branch, part


def chunks(batch: int, tokens: int) -> tuple[int, int]:
    """Rows that a program of the backward takes, and programs a sample."""
    chunk = max(1, -(-batch * tokens // _MOST_PROGRAMS))
    return chunk, -(-tokens // chunk)
