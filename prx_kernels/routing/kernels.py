"""Triton kernels of token routing and what launches them; the ops that use them stand in tokens.py.

A copy runs on integer views of its tensors: one compiled kernel for all dtypes of a width, exact for all bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, element_width, hint, jit, on_device, tl, tuned

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _sample_keep_kernel(out_ptr, ids_ptr, seed_ptr, tokens, kept, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a sample: draw 4·BLOCKS keys, find the `kept`-th smallest bit by bit, write the chosen in order."""
    sample = tl.program_id(0).to(tl.int64)
    sample_id = tl.load(ids_ptr + sample)
    counter = tl.arange(0, BLOCKS)
    nought = counter * 0
    low = nought + (sample_id & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = nought + (sample_id >> 32).to(tl.int32)
    # Word w of block c is the key of token 4·c + w. Padding gets the largest key and comes last, so it loses every tie.
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), counter, nought, low, high)
    token = 4 * counter
    w0 = tl.where(token < tokens, w0, 0xFFFFFFFF)
    w1 = tl.where(token + 1 < tokens, w1, 0xFFFFFFFF)
    w2 = tl.where(token + 2 < tokens, w2, 0xFFFFFFFF)
    w3 = tl.where(token + 3 < tokens, w3, 0xFFFFFFFF)

    # The kept-th smallest key is the largest value with fewer than `kept` keys below it.
    threshold = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        below = (w0 < candidate).to(tl.int32) + (w1 < candidate).to(tl.int32)
        below += (w2 < candidate).to(tl.int32) + (w3 < candidate).to(tl.int32)
        threshold = tl.where(tl.sum(below, axis=0) < kept, candidate, threshold)
        bit = bit >> 1

    ranks = _rank(w0, threshold) + _rank(w1, threshold) + _rank(w2, threshold) + _rank(w3, threshold)
    places = kept - (tl.sum(ranks, axis=0) & 0xFFFF)  # left for ties, which lower indices win
    before = tl.cumsum(ranks, axis=0) - ranks
    row = out_ptr + sample * kept
    before = _write_chosen(row, token, w0, threshold, before, places)
    before = _write_chosen(row, token + 1, w1, threshold, before, places)
    before = _write_chosen(row, token + 2, w2, threshold, before, places)
    _write_chosen(row, token + 3, w3, threshold, before, places)


@jit
def _rank(keys, threshold):  # type: ignore[no-untyped-def]
    """1 for a key below the threshold, 2^16 for a tie: one sum or scan serves both counts (each at most 16,384)."""
    return (keys < threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@jit
def _write_chosen(row_ptr, token, keys, threshold, before, places):  # type: ignore[no-untyped-def]
    """Write the tokens below the threshold and the first `places` ties; `before` counts both ahead of these keys."""
    ties = before >> 16
    position = (before & 0xFFFF) + tl.minimum(ties, places)
    tl.store(row_ptr + position, token, mask=(keys < threshold) | ((keys == threshold) & (ties < places)))
    return before + _rank(keys, threshold)


@jit
def _row_tile(kept, width, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Batch, rows and columns of this program: one number for all, as a row may have more tiles than a grid rows."""
    across = tl.cdiv(width, COLS)
    tiles = tl.cdiv(kept, ROWS)
    tile = tl.program_id(0) // across
    rows = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % across) * COLS + tl.arange(0, COLS)
    return (tile // tiles).to(tl.int64), rows, cols


@jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    keep_ptr,
    tokens,
    kept,
    width,
    x_batch,
    x_token,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[b, k] = x[b, keep[b, k]] on integer views; an index outside x gives all-ones bits, NaN in floats."""
    width, x_batch, x_token = hint(width, ALIGN), hint(x_batch, ALIGN), hint(x_token, ALIGN)
    batch, rows, cols = _row_tile(kept, width, ROWS, COLS)
    index = tl.load(keep_ptr + batch * kept + rows, mask=rows < kept, other=-1).to(tl.int64)
    valid = ((index >= 0) & (index < tokens))[:, None] & (cols < width)[None, :]
    values = tl.load(x_ptr + batch * x_batch + index[:, None] * x_token + cols[None, :], mask=valid, other=-1)
    place = out_ptr + (batch * kept + rows[:, None]) * width + cols[None, :]
    tl.store(place, values, mask=(rows < kept)[:, None] & (cols < width)[None, :])


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    y_ptr,
    keep_ptr,
    tokens,
    kept,
    width,
    x_batch,
    x_token,
    y_batch,
    y_token,
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    ADD: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Write all rows of out once: kept ones from y (plus x if ADD), the others from x; an absent tensor is zero.

    Which row of y belongs to a token is found by reading `keep` (a few KB, from L2) in every program. That hides under
    the copy, where a table of inverses would cost a launch and a rule on the order of `keep`.
    """
    width = hint(width, ALIGN)
    x_batch, x_token, y_batch, y_token = (
        hint(x_batch, ALIGN),
        hint(x_token, ALIGN),
        hint(y_batch, ALIGN),
        hint(y_token, ALIGN),
    )
    tiles = tl.cdiv(tokens, ROWS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    source = tl.full((ROWS,), -1, tl.int32)
    for first in range(0, kept, SCAN):
        k = first + tl.arange(0, SCAN)
        index = tl.load(keep_ptr + batch * kept + k, mask=k < kept, other=-1)
        hit = index[None, :] == rows[:, None]
        source = tl.maximum(source, tl.max(tl.where(hit, k[None, :], -1), axis=1))
    is_kept = (source >= 0)[:, None]
    inside = (rows < tokens)[:, None]
    x_rows = x_ptr + batch * x_batch + rows.to(tl.int64)[:, None] * x_token
    y_rows = y_ptr + batch * y_batch + source.to(tl.int64)[:, None] * y_token
    out_rows = out_ptr + (batch * tokens + rows[:, None]) * width
    for first in range(0, width, COLS):
        cols = (first + tl.arange(0, COLS))[None, :]
        mask = inside & (cols < width)
        values = tl.zeros((ROWS, COLS), out_ptr.dtype.element_ty)
        if HAS_X:
            values = tl.load(x_rows + cols, mask=mask & (is_kept == 0) if not ADD else mask, other=0)
        if HAS_Y:
            # One of two is zero unless ADD: the sum is a selection then, exact for the integer views of a copy.
            values += tl.load(y_rows + cols, mask=mask & is_kept, other=0)
        tl.store(out_rows + cols, values, mask=mask)


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    keep_ptr,
    tokens,
    kept,
    width,
    x_batch,
    x_token,
    y_batch,
    y_token,
    ADD: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """In place: rows `keep` of x become zero, or x + y if ADD; no other row, and nothing outside x, is touched."""
    width, x_batch, x_token = hint(width, ALIGN), hint(x_batch, ALIGN), hint(x_token, ALIGN)
    y_batch, y_token = hint(y_batch, ALIGN), hint(y_token, ALIGN)
    batch, rows, cols = _row_tile(kept, width, ROWS, COLS)
    mask = (rows < kept)[:, None] & (cols < width)[None, :]
    index = tl.load(keep_ptr + batch * kept + rows, mask=rows < kept, other=0).to(tl.int64)
    mask = mask & ((index >= 0) & (index < tokens))[:, None]
    place = x_ptr + batch * x_batch + index[:, None] * x_token + cols[None, :]
    values = tl.zeros((ROWS, COLS), x_ptr.dtype.element_ty)
    if ADD:
        addend = y_ptr + batch * y_batch + rows.to(tl.int64)[:, None] * y_token + cols[None, :]
        values = tl.load(place, mask=mask, other=0) + tl.load(addend, mask=mask, other=0)
    tl.store(place, values, mask=mask)


# --- launchers ---------------------------------------------------------------------------------------------------

# Keyed on tokens: 8 to 32 keys a thread. More warps shorten the 33 block-wide sums, which are the kernel's time.
SAMPLE_KEEP: Table = {
    0: (
        (1024, Config((), num_warps=4)),
        (16384, Config((), num_warps=16)),
    )
}
MAX_TOKENS = SAMPLE_KEEP[0][-1][0]

# Keyed on the bytes of an element: a tile row of 512 bytes is one 16-byte access of each lane of a warp. Not yet tuned
# on a GPU: chosen so that one program has 8 to 16 KB in flight.
GATHER: Table = {
    0: (
        (2, Config((("ROWS", 16), ("COLS", 256)))),
        (4, Config((("ROWS", 16), ("COLS", 128)))),
        (8, Config((("ROWS", 16), ("COLS", 64)))),
    )
}
MERGE: Table = {
    0: (
        (2, Config((("ROWS", 16), ("COLS", 256), ("SCAN", 256)))),
        (4, Config((("ROWS", 16), ("COLS", 128), ("SCAN", 256)))),
        (8, Config((("ROWS", 16), ("COLS", 32), ("SCAN", 256)))),
    )
}
# A sum holds two tiles: with four warps bfloat16 spills on sm_90, at sizes that 16 divides.
MERGE_ADD: Table = {
    0: (
        (2, Config((("ROWS", 16), ("COLS", 256), ("SCAN", 256)), num_warps=8)),
        (4, Config((("ROWS", 16), ("COLS", 128), ("SCAN", 256)))),
        (8, Config((("ROWS", 16), ("COLS", 32), ("SCAN", 256)))),
    )
}


def sample_keep(sample_ids: Tensor, seed: Tensor, tokens: int, kept: int) -> Tensor:
    out = torch.empty((sample_ids.shape[0], kept), dtype=torch.int32, device=sample_ids.device)
    config = tuned(SAMPLE_KEEP, tokens, out.device)
    blocks = 1 << max((tokens + 3) // 4 - 1, 0).bit_length()
    if out.numel():
        with on_device(out):
            _sample_keep_kernel[(out.shape[0],)](
                out, sample_ids.contiguous(), seed, tokens, kept, BLOCKS=blocks, **config.options
            )
    return out


def gather(x: Tensor, keep: Tensor) -> Tensor:
    out = torch.empty((*keep.shape, *x.shape[2:]), dtype=x.dtype, device=x.device)
    x, keep, kept = as_rows(_real(x)), keep.contiguous(), keep.shape[1]
    sizes = (x.shape[2], x.stride(0), x.stride(1))
    if out.numel():
        config = tuned(GATHER, x.element_size(), x.device)
        with on_device(x):
            _gather_kernel[_row_grid(keep.shape[0], kept, x.shape[2], config)](
                element_width(_real(out)), element_width(x), keep, x.shape[1], kept, *sizes,
                ALIGN=alignment(*sizes), **config.options,
            )  # fmt: skip
    return out


def merge(x: Tensor | None, y: Tensor | None, keep: Tensor, tokens: int, *, add: bool = False) -> Tensor:
    """Rows `keep` from y (plus x if `add`), the others from x; an absent tensor counts as zero."""
    like = x if x is not None else y
    assert like is not None, "merge needs at least one tensor"
    out = torch.empty((like.shape[0], tokens, *like.shape[2:]), dtype=like.dtype, device=like.device)
    keep, kept = keep.contiguous(), keep.shape[1]
    if out.numel() == 0:
        return out
    # A missing tensor is never read: any of the right dtype stands in its place.
    xs, ys = (as_rows(_real(t)) if t is not None else None for t in (x, y))
    a, b = xs if xs is not None else ys, ys if ys is not None else xs
    assert a is not None
    assert b is not None
    view = (lambda t: t) if add else element_width
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    config = tuned(MERGE_ADD if add else MERGE, a.element_size(), out.device)
    grid = (out.shape[0] * -(-tokens // config.options["ROWS"]),)
    with on_device(out):
        _merge_kernel[grid](
            view(_real(out)), view(a), view(b), keep, tokens, kept, a.shape[2], *strides,
            HAS_X=xs is not None, HAS_Y=ys is not None, ADD=add, ALIGN=alignment(a.shape[2], *strides),
            **config.options,
        )  # fmt: skip
    return out


def update(x: Tensor, y: Tensor | None, keep: Tensor) -> None:
    """In place: rows `keep` of x (batch, tokens, ...), dense, become zero, or x + y where y is given."""
    keep, kept = keep.contiguous(), keep.shape[1]
    if x.numel() == 0:
        return
    x = _real(x).view(x.shape[0], x.shape[1], -1)
    b = as_rows(_real(y)) if y is not None else x
    strides = (x.stride(0), x.stride(1), b.stride(0), b.stride(1))
    config = tuned(GATHER, x.element_size(), x.device)
    view = element_width if y is None else (lambda t: t)
    with on_device(x):
        _update_kernel[_row_grid(keep.shape[0], kept, x.shape[2], config)](
            view(x), view(b), keep, x.shape[1], kept, x.shape[2], *strides,
            ADD=y is not None, ALIGN=alignment(x.shape[2], *strides), **config.options,
        )  # fmt: skip


def as_rows(x: Tensor) -> Tensor:
    """(batch, tokens, ...) as (batch, tokens, width) with dense rows; only what is not dense already is copied."""
    rows = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def _real(x: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, which Triton knows, and which rows are copied and added by."""
    return torch.view_as_real(x) if x.is_complex() else x


def _row_grid(batch: int, rows: int, width: int, config: Config) -> tuple[int]:
    return (batch * -(-rows // config.options["ROWS"]) * -(-width // config.options["COLS"]),)
