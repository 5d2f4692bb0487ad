"""Triton kernels of the x-prediction loss: one pass over tokens and pixels gives the loss and its gradient.

Pixels are read where they stand, in patch order: a token is a place in the picture, a feature (channel, row, column) an
offset from it. Sums are two-stage in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import MAX_GRID_Y, Config, Table, alignment, hint, jit, on_device, tl, tuned

# --- device functions --------------------------------------------------------------------------------------------


@jit
def token_places(rows, tokens, columns, width, sb, sh, sw, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each token: its sample, the offset of its first pixel in memory, and that pixel's number in the sample."""
    sample = rows // tokens
    place = rows % tokens
    y = (place // columns) * P
    x = (place % columns) * P
    offset = sample.to(tl.int64) * sb + y.to(tl.int64) * sh + x.to(tl.int64) * sw
    return sample, offset, y * width + x


@jit
def feature_offsets(features, sc, sh, sw, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offset in memory of each feature (channel, row, column) of a patch from the patch's first pixel."""
    channel = (features // (P * P)).to(tl.int64)
    row = ((features // P) % P).to(tl.int64)
    return channel * sc + row * sh + (features % P).to(tl.int64) * sw


@jit
def pixel_values(x):  # type: ignore[no-untyped-def]
    """Pixels in float32; uint8 scaled to [-1, 1]."""
    if x.dtype == tl.uint8:
        return x.to(tl.float32) * (1.0 / 127.5) - 1.0
    else:  # noqa: RET505 (Triton compiles one branch; without the else both)
        return x.to(tl.float32)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    part_ptr, grad_ptr, tokens_ptr, image_ptr, t_ptr, tokens, columns, width, features, sb, sc, sh, sw, t_min, unit,
    P: tl.constexpr, GRAD: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (r, b): sum of squares over ROWS tokens of sample b, divided by max(t, t_min)²; and their gradient."""
    features = hint(features, ALIGN)
    sb, sc, sh = hint(sb, PIXELS), hint(sc, PIXELS), hint(sh, PIXELS)
    sample = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (token < tokens)[:, None]
    place = sample * tokens + token
    _, offset, _ = token_places(place, tokens, columns, width, sb, sh, sw, P)
    clamped = tl.maximum(tl.load(t_ptr + sample).to(tl.float32), t_min)
    weight = 1.0 / (clamped * clamped)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, features, COLS):
        feature = first + tl.arange(0, COLS)
        mask = inside & (feature < features)[None, :]
        row = place.to(tl.int64)[:, None] * features + feature[None, :]
        guess = tl.load(tokens_ptr + row, mask=mask, other=0.0).to(tl.float32)
        pixels = image_ptr + (offset[:, None] + feature_offsets(feature, sc, sh, sw, P)[None, :])
        error = tl.where(mask, guess - pixel_values(tl.load(pixels, mask=mask, other=0)), 0.0)
        acc += error * error
        if GRAD:
            tl.store(grad_ptr + row, (error * (weight * unit)).to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(part_ptr + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(acc, axis=1), axis=0) * weight)


@jit
def _scale_kernel(  # type: ignore[no-untyped-def]
    out_ptr, x_ptr, factor_ptr, factor_stride, unit, count,
    IN_PLACE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x·factor·unit a sample. In place, a factor of 1 (a loss that is the whole loss) costs no traffic."""
    count = hint(count, ALIGN)
    sample = tl.program_id(1).to(tl.int64)
    factor = tl.load(factor_ptr + sample * factor_stride).to(tl.float32) * unit
    if not IN_PLACE or factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + sample * count + place, mask=place < count, other=0.0)
        out = (x.to(tl.float32) * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + sample * count + place, out, mask=place < count)


# --- launchers ---------------------------------------------------------------------------------------------------

# Keyed on features of a token: a program reads about 24 KB of bfloat16. Provisional: not yet tuned on a GPU.
LOSS: Table = {
    0: (
        (512, Config((("ROWS", 32), ("COLS", 64)), num_warps=4)),
        (2**31, Config((("ROWS", 8), ("COLS", 256)), num_warps=4)),
    )
}
_MAX_TOKENS = 2**31 - 1024  # kernels number them in 32 bits, those that a last tile has too many included
SCALE: Table = {0: ((2**63, Config((("BLOCK", 2048),), num_warps=8)),)}


def picture_geometry(image: Tensor, patch_size: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Tokens, grid columns, width and pixels of a channel; and the picture's strides.

    Raises:
        ValueError: more values in a picture, or more tokens in the batch, than kernels number in 32 bits.
    """
    batch, channels, height, width = image.shape
    if channels * height * width >= 2**31:
        raise ValueError(f"a picture must have fewer than 2^31 values, got {channels}x{height}x{width}")
    columns = width // patch_size
    tokens = height // patch_size * columns
    if batch * tokens > _MAX_TOKENS:
        raise ValueError(f"a batch must have at most {_MAX_TOKENS} tokens, got {batch} pictures of {tokens}")
    strides = (image.stride(0), image.stride(1), image.stride(2), image.stride(3))
    return (tokens, columns, width, height * width), strides


def loss(
    tokens: Tensor, image: Tensor, t: Tensor, patch_size: int, t_min: float, gradient: Tensor | None, unit: float
) -> Tensor:
    """Per-sample losses (batch,) float32; where `gradient` is given, `error·unit/max(t, t_min)²` is written to it."""
    batch, count, features = tokens.shape
    if tokens.numel() == 0:
        return torch.full((batch,), float("nan"), device=tokens.device)  # the mean of nothing, as torch has it
    tokens, t = tokens.contiguous(), t.contiguous()
    (_, columns, width, _), strides = picture_geometry(image, patch_size)
    config = tuned(LOSS, features, tokens.device)
    chunks = -(-count // config.options["ROWS"])
    parts = torch.empty((batch, chunks), dtype=torch.float32, device=tokens.device)
    with on_device(tokens):
        for first in range(0, batch, MAX_GRID_Y):
            some = slice(first, first + MAX_GRID_Y)
            _loss_kernel[(chunks, parts[some].shape[0])](
                parts[some], tokens[some] if gradient is None else gradient[some], tokens[some], image[some], t[some],
                count, columns, width, features, *strides, t_min, unit,
                P=patch_size, GRAD=gradient is not None, ALIGN=alignment(features), PIXELS=alignment(*strides[:3]),
                **config.options,
            )  # fmt: skip
    return parts.sum(1) / (count * features)


def scale(x: Tensor, factor: Tensor, unit: float, *, in_place: bool) -> Tensor:
    """x (batch, N, features) dense, times factor, a scalar or (batch,), times unit; a new tensor unless in place."""
    out = x if in_place else torch.empty_like(x)
    batch, count = x.shape[0], x.shape[1] * x.shape[2]
    if x.numel():
        config = tuned(SCALE, count, x.device)
        factor = factor.contiguous()
        with on_device(x):
            for first in range(0, batch, MAX_GRID_Y):
                some = slice(first, first + MAX_GRID_Y)
                _scale_kernel[(-(-count // config.options["BLOCK"]), x[some].shape[0])](
                    out[some], x[some], factor[some] if factor.ndim else factor, factor.ndim, unit, count,
                    IN_PLACE=in_place, ALIGN=alignment(count), **config.options,
                )  # fmt: skip
    return out
