"""Triton kernels of symmetric products and what launches them; the ops that use them stand in symmetric_product.py.

A program computes one tile of the upper triangle and writes it twice, the second time transposed. Two forms of one
kernel: operands through TMA descriptors where the architecture has them, through pointers elsewhere.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, capability, hint, jit, on_device, tl, tuned
from . import reference

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _tile(tiles, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Batch, first row and first column of this program: tiles of the upper triangle, column after column.

    Column j of tiles holds the (j + 1)·COLS/ROWS tiles that reach the diagonal or lie above it.
    """
    RATIO: tl.constexpr = COLS // ROWS
    batch = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles
    j = ((tl.sqrt(8.0 * (t // RATIO).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The square root is rounded: one step to either side puts j right.
    j -= (RATIO * (j * (j + 1) // 2) > t).to(tl.int32)
    j += (RATIO * ((j + 1) * (j + 2) // 2) <= t).to(tl.int32)
    return batch, (t - RATIO * (j * (j + 1) // 2)) * ROWS, j * COLS


@jit
def _mirror(x, gamma, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A square on the diagonal: gamma added there, the lower half replaced by the upper one."""
    rows = tl.arange(0, SIZE)[:, None]
    cols = tl.arange(0, SIZE)[None, :]
    return tl.where(rows <= cols, x + tl.where(rows == cols, gamma, 0.0), tl.trans(x))


@jit
def _halves(x, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right square of a tile twice as wide as high."""
    return tl.split(x.reshape(ROWS, 2, ROWS).permute(0, 2, 1))


@jit
def _store_tma(x, gamma, out_desc, batch, row, col, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A square and its mirror image; one below the diagonal is the image of another and dropped."""
    if row == col:
        x = _mirror(x, gamma, SIZE)
    rounded = x.to(out_desc.dtype)
    if row <= col:
        out_desc.store([batch, row, col], rounded.reshape(1, SIZE, SIZE))
    if row < col:
        out_desc.store([batch, col, row], tl.trans(rounded).reshape(1, SIZE, SIZE))


@jit
def _finish_tma(  # type: ignore[no-untyped-def]
    acc, alpha, beta, gamma, c_desc, out_desc, batch, row, col, HAS_C: tl.constexpr, SIZE: tl.constexpr
):
    """The epilogue of one square tile."""
    acc *= alpha
    if HAS_C:
        acc += beta * c_desc.load([batch, row, col]).reshape(SIZE, SIZE).to(tl.float32)
    _store_tma(acc, gamma, out_desc, batch, row, col, SIZE)


@jit
def _store(x, gamma, out_ptr, out_row, row, col, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`_store_tma` by pointers."""
    rows = row + tl.arange(0, SIZE)
    cols = col + tl.arange(0, SIZE)
    if row == col:
        x = _mirror(x, gamma, SIZE)
    rounded = x.to(out_ptr.dtype.element_ty)
    if row <= col:
        mask = (rows < n)[:, None] & (cols < n)[None, :]
        tl.store(out_ptr + rows.to(tl.int64)[:, None] * out_row + cols[None, :], rounded, mask=mask)
    if row < col:
        mask = (cols < n)[:, None] & (rows < n)[None, :]
        tl.store(out_ptr + cols.to(tl.int64)[:, None] * out_row + rows[None, :], tl.trans(rounded), mask=mask)


@jit
def _sym_gemm_tma_kernel(  # type: ignore[no-untyped-def]
    a_desc,
    b_desc,
    c_desc,
    out_desc,
    scale_ptr,
    k,
    tiles,
    alpha,
    beta,
    gamma,
    HAS_C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PAIR: tl.constexpr,
):
    """alpha·scale²·A·Bᵀ + beta·C + gamma·I. Descriptors give zeros outside a matrix and write nothing there.

    With PAIR a tile twice as wide as high is two accumulators: one of 128 × 256 takes more registers than there are.
    """
    batch, row, col = _tile(tiles, ROWS, COLS)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + batch)
        alpha *= scale * scale
    if PAIR:
        left = tl.zeros((ROWS, ROWS), tl.float32)
        right = tl.zeros((ROWS, ROWS), tl.float32)
        for depth in range(0, k, DEPTH):
            if TRANSPOSED:
                a = tl.trans(a_desc.load([batch, depth, row]).reshape(DEPTH, ROWS))
                b = b_desc.load([batch, depth, col]).reshape(DEPTH, ROWS)
                c = b_desc.load([batch, depth, col + ROWS]).reshape(DEPTH, ROWS)
            else:
                a = a_desc.load([batch, row, depth]).reshape(ROWS, DEPTH)
                b = tl.trans(b_desc.load([batch, col, depth]).reshape(ROWS, DEPTH))
                c = tl.trans(b_desc.load([batch, col + ROWS, depth]).reshape(ROWS, DEPTH))
            left = tl.dot(a, b, left)
            right = tl.dot(a, c, right)
        _finish_tma(left, alpha, beta, gamma, c_desc, out_desc, batch, row, col, HAS_C, ROWS)
        _finish_tma(right, alpha, beta, gamma, c_desc, out_desc, batch, row, col + ROWS, HAS_C, ROWS)
    else:
        if HAS_C and not HAS_SCALE:  # before the products: behind them C has no registers to go to
            acc = (beta / alpha) * c_desc.load([batch, row, col]).reshape(ROWS, COLS).to(tl.float32)
        else:
            acc = tl.zeros((ROWS, COLS), tl.float32)
        for depth in range(0, k, DEPTH):
            if TRANSPOSED:  # stored as (k, n)
                a = tl.trans(a_desc.load([batch, depth, row]).reshape(DEPTH, ROWS))
                b = b_desc.load([batch, depth, col]).reshape(DEPTH, COLS)
            else:
                a = a_desc.load([batch, row, depth]).reshape(ROWS, DEPTH)
                b = tl.trans(b_desc.load([batch, col, depth]).reshape(COLS, DEPTH))
            acc = tl.dot(a, b, acc)
        if ROWS == COLS:
            _finish_tma(acc, alpha, beta, gamma, c_desc, out_desc, batch, row, col, HAS_C and HAS_SCALE, ROWS)
        else:
            acc *= alpha
            if HAS_C and HAS_SCALE:
                acc += beta * c_desc.load([batch, row, col]).reshape(ROWS, COLS).to(tl.float32)
            left, right = _halves(acc, ROWS)
            _store_tma(left, gamma, out_desc, batch, row, col, ROWS)
            _store_tma(right, gamma, out_desc, batch, row, col + ROWS, ROWS)


@jit
def _sym_gemm_pointer_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    scale_ptr,
    n,
    k,
    tiles,
    a_batch,
    a_row,
    b_batch,
    b_row,
    c_batch,
    c_row,
    out_batch,
    out_row,
    alpha,
    beta,
    gamma,
    HAS_C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The same without descriptors; float32 products are IEEE."""
    n, k = hint(n, ALIGN), hint(k, ALIGN)
    a_batch, a_row, b_batch, b_row = hint(a_batch, ALIGN), hint(a_row, ALIGN), hint(b_batch, ALIGN), hint(b_row, ALIGN)
    c_batch, c_row = hint(c_batch, ALIGN), hint(c_row, ALIGN)
    out_batch, out_row = hint(out_batch, ALIGN), hint(out_row, ALIGN)
    batch, row, col = _tile(tiles, ROWS, COLS)
    batch = batch.to(tl.int64)
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    deep = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for depth in range(0, k, DEPTH):
        at = depth + deep
        if TRANSPOSED:
            a = tl.load(
                a_ptr + batch * a_batch + at.to(tl.int64)[:, None] * a_row + rows[None, :],
                mask=(at < k)[:, None] & (rows < n)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                b_ptr + batch * b_batch + at.to(tl.int64)[:, None] * b_row + cols[None, :],
                mask=(at < k)[:, None] & (cols < n)[None, :], other=0.0,
            )  # fmt: skip
            a = tl.trans(a)
        else:
            a = tl.load(
                a_ptr + batch * a_batch + rows.to(tl.int64)[:, None] * a_row + at[None, :],
                mask=(rows < n)[:, None] & (at < k)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.load(
                b_ptr + batch * b_batch + cols.to(tl.int64)[:, None] * b_row + at[None, :],
                mask=(cols < n)[:, None] & (at < k)[None, :], other=0.0,
            )  # fmt: skip
            b = tl.trans(b)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_SCALE:
        scale = tl.load(scale_ptr + batch)
        alpha *= scale * scale
    acc *= alpha
    inside = (rows < n)[:, None] & (cols < n)[None, :]
    if HAS_C:
        c_tile = c_ptr + batch * c_batch + rows.to(tl.int64)[:, None] * c_row + cols[None, :]
        acc += beta * tl.load(c_tile, mask=inside, other=0.0).to(tl.float32)
    out_ptr += batch * out_batch
    if ROWS == COLS:
        _store(acc, gamma, out_ptr, out_row, row, col, n, ROWS)
    else:
        left, right = _halves(acc, ROWS)
        _store(left, gamma, out_ptr, out_row, row, col, n, ROWS)
        _store(right, gamma, out_ptr, out_row, row, col + ROWS, n, ROWS)


# --- launchers ---------------------------------------------------------------------------------------------------


def _tile_config(rows: int, cols: int, depth: int, num_warps: int, num_stages: int) -> Config:
    return Config((("ROWS", rows), ("COLS", cols), ("DEPTH", depth)), num_warps, num_stages)


# What `python -m benchmarks.tune` times on a GPU; all build for sm_90 without a spill. Registers a thread, blocks a
# multiprocessor, and the share of the matrix units' rate that reading and filling shared memory leaves, by count:
CANDIDATES = (
    _tile_config(64, 64, 64, 4, 4),  # 104, 3, 50 %
    _tile_config(64, 128, 64, 4, 4),  # 178, 2, 67 %
    _tile_config(128, 128, 64, 8, 4),  # 144, 1, 80 %
    _tile_config(128, 128, 64, 4, 3),  # 255, 2, 80 %
    _tile_config(128, 256, 64, 8, 4),  # two accumulators: 203, 1, 89 %
)
_SMALL, _HALF, _WHOLE, _TWO_BLOCKS, _PAIR = CANDIDATES

# Keyed on the tiles of 128 × 128 in all upper triangles of the batch. Chosen by counting (benchmarks/tiles.py), until
# `python -m benchmarks.tune` has run on a GPU. On the 132 multiprocessors of an H200 a matrix of n = 1792 has 105 such
# tiles. Two blocks a multiprocessor hide one's epilogue, which moves as many bytes as a third of its products takes
# time, under the other's products. A batch of 1 or 3 ends in a round that is not full: halves of tiles fill it better.
# Splitting along K would even it out, at the price of 4-byte partial sums through memory: at n = 1792 that costs more
# than the 20 % of a round it saves. Below a quarter of a round small tiles shorten the critical path.
_HOPPER = ((33, _SMALL), (105, _HALF), (210, _TWO_BLOCKS), (315, _HALF), (2**31 - 1, _TWO_BLOCKS))
_BLACKWELL = ((33, _SMALL), (420, _HALF), (2**31 - 1, _WHOLE))
TMA: Table = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}
POINTER: Table = {0: ((33, _tile_config(64, 64, 64, 4, 3)), (2**31 - 1, _tile_config(128, 128, 32, 8, 4)))}
# Rows that are not of 16·k bytes are read element by element, which takes registers for addresses.
UNALIGNED: Table = {0: ((2**31 - 1, _tile_config(32, 32, 32, 4, 2)),)}
FLOAT32: Table = {0: ((2**31 - 1, _tile_config(64, 64, 16, 4, 3)),)}


def sym_gemm(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, out: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Write alpha·scales²·A·Bᵀ + beta·C + gamma·I to out, (batch, n, n); no C counts as beta = 0."""
    if out.numel() == 0:
        return
    if A.dtype == torch.float64 or A.shape[2] == 0 or alpha == 0.0:
        out.copy_(reference.sym_gemm(A, B, C, alpha=alpha, beta=beta, gamma=gamma, scales=scales))
        return
    transposed = _dense(A.mT) and _dense(B.mT) and not (_dense(A) and _dense(B))
    if transposed:
        A, B = A.mT, B.mT  # (batch, k, n), as they lie in memory
    A, B = (x if _dense(x) else x.contiguous() for x in (A, B))
    C = C if C is None or _dense(C) else C.contiguous()
    target = out if _dense(out) else out.new_empty(out.shape)
    config, with_tma = choose(A, B, C, target)
    with on_device(out):
        (_launch_tma if with_tma else _launch_pointer)(
            A, B, C, target, alpha, beta, gamma, transposed, config, scales
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def choose(A: Tensor, B: Tensor, C: Tensor | None, out: Tensor) -> tuple[Config, bool]:
    """Launch settings, and whether the operands go through descriptors."""
    side = -(-out.shape[1] // 128)
    size = out.shape[0] * (side * (side + 1) // 2)
    tensors = [x for x in (A, B, C, out) if x is not None]
    if out.dtype == torch.float32:
        return tuned(FLOAT32, size, out.device), False
    if capability(out.device) in TMA and all(map(_fits_tma, tensors)):
        return tuned(TMA, size, out.device), True
    if _alignment(tensors) < 8:
        return tuned(UNALIGNED, size, out.device), False
    return tuned(POINTER, size, out.device), False


def _launch_tma(
    A: Tensor, B: Tensor, C: Tensor | None, out: Tensor, alpha: float, beta: float, gamma: float,
    transposed: bool, config: Config, scales: Tensor | None = None,
) -> None:  # fmt: skip
    rows, cols, depth = (config.options[name] for name in ("ROWS", "COLS", "DEPTH"))
    pair = cols > 128
    width = rows if pair else cols
    _sym_gemm_tma_kernel[(out.shape[0] * tiles_of(out.shape[1], config),)](
        _descriptor(A, (depth, rows) if transposed else (rows, depth)),
        _descriptor(B, (depth, width) if transposed else (width, depth)),
        None if C is None else _descriptor(C, (rows, width)),
        _descriptor(out, (rows, rows)),
        scales, A.shape[1 if transposed else 2], tiles_of(out.shape[1], config), alpha, beta, gamma,
        HAS_C=C is not None, HAS_SCALE=scales is not None, TRANSPOSED=transposed, PAIR=pair, **config.options,
    )  # fmt: skip


def _launch_pointer(
    A: Tensor, B: Tensor, C: Tensor | None, out: Tensor, alpha: float, beta: float, gamma: float,
    transposed: bool, config: Config, scales: Tensor | None = None,
) -> None:  # fmt: skip
    c = out if C is None else C  # not read without C
    n, k = out.shape[1], A.shape[1 if transposed else 2]
    strides = [stride for x in (A, B, c, out) for stride in x.stride()[:2]]
    _sym_gemm_pointer_kernel[(out.shape[0] * tiles_of(n, config),)](
        A, B, c, out, scales, n, k, tiles_of(n, config), *strides, alpha, beta, gamma, HAS_C=C is not None,
        HAS_SCALE=scales is not None, TRANSPOSED=transposed, ALIGN=_alignment([A, B, c, out]), **config.options,
    )  # fmt: skip


def tiles_of(n: int, config: Config) -> int:
    """Tiles of one matrix that reach its diagonal or lie above it; the last may hold nothing but padding."""
    rows, cols = config.options["ROWS"], config.options["COLS"]
    side = -(-n // cols)
    return side * (side + 1) // 2 * (cols // rows)


def _dense(x: Tensor) -> bool:
    """Elements of a row lie side by side."""
    return x.stride(2) == 1 or x.shape[2] == 1


def _alignment(tensors: list[Tensor]) -> int:
    """Elements, at most 8, that divide every size, stride and address: what the pointer form may assume."""
    sizes = [number for x in tensors for number in (*x.shape[1:], *x.stride()[:2], x.data_ptr() // x.element_size())]
    return min(8, alignment(*sizes))


def _fits_tma(x: Tensor) -> bool:
    """Base and strides in multiples of 16 bytes, matrices behind one another, sizes and strides in range."""
    batch, row = (_batch_stride(x) * x.element_size(), x.stride(1) * x.element_size())
    aligned = x.data_ptr() % 16 == 0 and batch % 16 == 0 and row % 16 == 0 and x.stride(2) == 1
    ordered = x.stride(1) >= x.shape[2] and _batch_stride(x) >= x.stride(1) * x.shape[1]
    return aligned and ordered and batch < 2**40 and max(x.shape) < 2**31


def _batch_stride(x: Tensor) -> int:
    """The stride of a dimension of one entry is of no meaning, and may be of any size."""
    return x.stride(0) if x.shape[0] > 1 else x.stride(1) * x.shape[1]


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    # Imported here: Triton's tools load more than a quick `import prx_kernels` should.
    tools: Any = importlib.import_module("triton.tools.tensor_descriptor")
    strides = [_batch_stride(x), x.stride(1), 1]
    return tools.TensorDescriptor(x, list(x.shape), strides, [1, *block])
