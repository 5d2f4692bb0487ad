"""Triton kernels that divide matrices by their Frobenius norms; the op that uses them stands in iteration.py.

Two passes over the input: partial sums of squares, then the quotient. Nothing is added in an order that depends on time
or on the place in a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import Config, Table, hint, jit, on_device, tl, tuned
from . import reference

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _partial_norm_kernel(  # type: ignore[no-untyped-def]
    largest_ptr, sum_ptr, x_ptr, size, chunk, x_batch, parts, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one chunk of one matrix: the largest |x|, and the sum of (x / largest)², which cannot overflow."""
    batch = (tl.program_id(0) // parts).to(tl.int64)
    part = (tl.program_id(0) % parts).to(tl.int64)
    size, chunk, x_batch = hint(size, ALIGN), hint(chunk, ALIGN), hint(x_batch, ALIGN)
    start = part * chunk
    end = tl.minimum(start + chunk, size)
    largest = tl.full((BLOCK,), 1e-30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + batch * x_batch + at, mask=at < end, other=0.0).to(tl.float32)
        new = tl.maximum(largest, tl.abs(x))
        total = total * (largest / new) * (largest / new) + (x / new) * (x / new)
        largest = new
    most = tl.max(largest, axis=0)
    tl.store(largest_ptr + batch * parts + part, most)
    tl.store(sum_ptr + batch * parts + part, tl.sum(total * (largest / most) * (largest / most), axis=0))


@jit
def _divide_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    largest_ptr,
    sum_ptr,
    size,
    blocks,
    x_batch,
    out_batch,
    eps,
    parts,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = x / (norm + eps), formed as (x / largest) / (norm / largest + eps / largest)."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    size, x_batch, out_batch = hint(size, ALIGN), hint(x_batch, ALIGN), hint(out_batch, ALIGN)
    every = tl.arange(0, PARTS)
    partial = tl.load(largest_ptr + batch * parts + every, mask=every < parts, other=1e-30)
    largest = tl.max(partial, axis=0)
    sums = tl.load(sum_ptr + batch * parts + every, mask=every < parts, other=0.0)
    norm = tl.sqrt(tl.sum(sums * (partial / largest) * (partial / largest), axis=0))
    divisor = norm + eps / largest
    divisor = tl.where(divisor < 1e-30, 1e-30, divisor)  # a NaN stays one
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + batch * x_batch + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * out_batch + at, ((x / largest) / divisor).to(out_ptr.dtype.element_ty), mask=at < size)


# --- launcher ----------------------------------------------------------------------------------------------------

# Elements a program has in flight, 16 to 32 bytes a thread and load; keyed on the bytes of an element. Not yet tuned.
BLOCK: Table = {0: ((2, Config((("BLOCK", 2048),), num_warps=8)), (4, Config((("BLOCK", 2048),), num_warps=8)))}
CHUNK = 32 * 2048  # elements of a partial sum: 98 programs for a matrix of 1792 × 3584
MAX_PARTS = 1024  # partial sums of a matrix; larger matrices have larger chunks


def unit_norm(G: Tensor, eps: float, out: Tensor) -> None:
    """Write G / (‖G‖_F + eps) for each matrix of (batch, rows, columns) to out, contiguous and of the same shape."""
    if out.numel() == 0:
        return
    if torch.float64 in (G.dtype, out.dtype) or not out.is_contiguous():
        out.copy_(reference.unit_norm(G, out.dtype, eps=eps))
        return
    G = G.contiguous()
    batch, size = G.shape[0], G.shape[1] * G.shape[2]
    config = tuned(BLOCK, G.element_size(), G.device)
    block = config.options["BLOCK"]
    chunk = max(CHUNK, -(-size // (MAX_PARTS * block)) * block)
    parts, blocks = -(-size // chunk), -(-size // block)
    largest = torch.empty((batch, parts), dtype=torch.float32, device=G.device)
    total = torch.empty_like(largest)
    settings: dict[str, Any] = {"ALIGN": 16 if size % 16 == 0 else 1, **config.options}
    with on_device(G):
        _partial_norm_kernel[(batch * parts,)](largest, total, G, size, chunk, size, parts, **settings)
        _divide_kernel[(batch * blocks,)](
            out, G, largest, total, size, blocks, size, size, eps, parts,
            PARTS=1 << (parts - 1).bit_length(), **settings,
        )  # fmt: skip
