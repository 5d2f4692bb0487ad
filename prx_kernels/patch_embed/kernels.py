"""Triton kernels of the patch embedding: pixels are read where they stand, in patch order, and noise forms on the way.

A product's tile of pixels is (tokens, features): a token is a place in the picture, a feature (channel, row, column) an
offset from it, so that no unfolded tensor exists. `x_t = (1-t)·x0 + t·scale·eps` is formed in float32 in registers.
"""

from __future__ import annotations

from ..launch import hint, jit, tl
from ..noise.kernels import normals_in_fours, normals_one_by_one, philox_counter
from ..pixel_loss.kernels import feature_offsets, pixel_values, token_places

# --- device functions --------------------------------------------------------------------------------------------


@jit
def feature_numbers(features, plane, width, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same offset in row-major numbering of a sample's elements, which the noise follows whatever the strides."""
    return (features // (P * P)) * plane + ((features // P) % P) * width + features % P


@jit
def _noisy(  # type: ignore[no-untyped-def]
    x, first, number, sample, inside, t_ptr, ids_ptr, seed_ptr, plane, width, noise_scale,
    P: tl.constexpr, FOURS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x_t of a float32 tile x whose features start at `first`; `number` is that of each token's first pixel."""
    t = tl.load(t_ptr + sample, mask=inside, other=0.0).to(tl.float32)[:, None]
    low, high = philox_counter(tl.load(ids_ptr + sample, mask=inside, other=0))
    seed = tl.load(seed_ptr)
    if FOURS:  # four features that follow one another are four pixels of a row, and one Philox block
        numbers = feature_numbers(first + 4 * tl.arange(0, COLS // 4), plane, width, P)
        blocks = (number[:, None] + numbers[None, :]) // 4
        eps = normals_in_fours(seed, blocks, low[:, None], high[:, None])
    else:
        numbers = feature_numbers(first + tl.arange(0, COLS), plane, width, P)
        eps = normals_one_by_one(seed, number[:, None] + numbers[None, :], low[:, None], high[:, None])
    return (1.0 - t) * x + t * (noise_scale * eps)


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def project_kernel(  # type: ignore[no-untyped-def]
    out_ptr, image_ptr, weight_ptr, bias_ptr, t_ptr, ids_ptr, seed_ptr, rows, features, bottleneck, tokens, columns,
    width, plane, sb, sc, sh, sw, noise_scale, steps,
    P: tl.constexpr, NOISE: tl.constexpr, FOURS: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of pixels·weightᵀ over `steps` tiles of features: with the bias, or as one of the float32 partial sums."""
    features, bottleneck = hint(features, ALIGN), hint(bottleneck, ALIGN)
    sb, sc, sh = hint(sb, PIXELS), hint(sc, PIXELS), hint(sh, PIXELS)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    split = tl.program_id(2)
    inside = token < rows
    sample, offset, number = token_places(token, tokens, columns, width, sb, sh, sw, P)
    weight_rows = weight_ptr + col.to(tl.int64)[:, None] * features
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(features, DEPTH))):
        feature = step * DEPTH + tl.arange(0, DEPTH)
        known = (feature < features)[None, :]
        places = image_ptr + (offset[:, None] + feature_offsets(feature, sc, sh, sw, P)[None, :])
        x = tl.load(places, mask=inside[:, None] & known, other=0)
        if NOISE:
            x = _noisy(
                pixel_values(x), step * DEPTH, number, sample, inside, t_ptr, ids_ptr, seed_ptr, plane, width,
                noise_scale, P, FOURS, DEPTH,
            )  # fmt: skip
        elif x.dtype != weight_ptr.dtype.element_ty:
            x = pixel_values(x)
        w = tl.load(weight_rows + feature[None, :], mask=(col < bottleneck)[:, None] & known, other=0.0)
        acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + col, mask=col < bottleneck, other=0.0).to(tl.float32)[None, :]
    if PARTIAL:
        out_ptr += split.to(tl.int64) * rows * bottleneck
    out = out_ptr + token.to(tl.int64)[:, None] * bottleneck + col[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (col < bottleneck)[None, :])


@jit
def weight_gradient_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grad_ptr, image_ptr, t_ptr, ids_ptr, seed_ptr, rows, features, bottleneck, tokens, columns, width, plane,
    sb, sc, sh, sw, noise_scale, steps,
    P: tl.constexpr, NOISE: tl.constexpr, FOURS: tl.constexpr, PARTIAL: tl.constexpr, ALIGN: tl.constexpr,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS of the bottleneck, COLS features) of gradᵀ·pixels over `steps` tiles of DEPTH tokens."""
    first = tl.program_id(0) * COLS
    feature = first + tl.arange(0, COLS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    bottleneck, features = hint(bottleneck, ALIGN), hint(features, ALIGN)
    sb, sc, sh = hint(sb, PIXELS), hint(sc, PIXELS), hint(sh, PIXELS)
    offsets = feature_offsets(feature, sc, sh, sw, P)[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(rows, DEPTH))):
        token = step * DEPTH + tl.arange(0, DEPTH)
        inside = token < rows
        sample, offset, number = token_places(token, tokens, columns, width, sb, sh, sw, P)
        grad_rows = grad_ptr + token.to(tl.int64)[:, None] * bottleneck
        grad = tl.load(grad_rows + row[None, :], mask=inside[:, None] & (row < bottleneck)[None, :], other=0.0)
        known = inside[:, None] & (feature < features)[None, :]
        x = tl.load(image_ptr + (offset[:, None] + offsets), mask=known, other=0)
        if NOISE:
            x = _noisy(
                pixel_values(x), first, number, sample, inside, t_ptr, ids_ptr, seed_ptr, plane, width, noise_scale,
                P, FOURS, COLS,
            )  # fmt: skip
        elif x.dtype != grad_ptr.dtype.element_ty:
            x = pixel_values(x)
        acc = tl.dot(tl.trans(grad), x.to(grad.dtype), acc, input_precision="ieee")
    if PARTIAL:
        out_ptr += split.to(tl.int64) * bottleneck * features
    out = out_ptr + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < bottleneck)[:, None] & (feature < features)[None, :])


@jit
def image_gradient_kernel(  # type: ignore[no-untyped-def]
    out_ptr, grad_ptr, weight_ptr, t_ptr, rows, features, bottleneck, tokens, columns, width, plane, volume,
    P: tl.constexpr, NOISE: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of grad·weight, times 1-t where noise was added, written to the pixels of a dense picture."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bottleneck, features = hint(bottleneck, ALIGN), hint(features, ALIGN)
    inside, known = token < rows, feature < features
    volume, plane, width = hint(volume, PIXELS), hint(plane, PIXELS), hint(width, PIXELS)
    sample, offset, _ = token_places(token, tokens, columns, width, volume, width, 1, P)
    grad_rows = grad_ptr + token.to(tl.int64)[:, None] * bottleneck
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, bottleneck, DEPTH):
        middle = first + tl.arange(0, DEPTH)
        grad = tl.load(grad_rows + middle[None, :], mask=inside[:, None] & (middle < bottleneck)[None, :], other=0.0)
        w = tl.load(
            weight_ptr + middle.to(tl.int64)[:, None] * features + feature[None, :],
            mask=(middle < bottleneck)[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(grad, w, acc, input_precision="ieee")
    if NOISE:
        acc *= 1.0 - tl.load(t_ptr + sample, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + (offset[:, None] + feature_offsets(feature, plane, width, 1, P)[None, :])
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & known[None, :])


@jit
def sum_parts_kernel(  # type: ignore[no-untyped-def]
    out_ptr, parts_ptr, bias_ptr, count, width, parts, BIAS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """out = sum of `parts` float32 tensors of `count` elements, in order, plus a bias along the last axis."""
    count = hint(count, ALIGN)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = parts_ptr + place
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        acc += tl.load(source, mask=place < count, other=0.0)
        source += count
    if BIAS:
        acc += tl.load(bias_ptr + place % width, mask=place < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=place < count)
