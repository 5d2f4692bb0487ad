"""Counter-based normals inside a kernel: Philox 4x32-10 and Box-Muller as `reference.philox_normal` defines them.

Integers are bitwise those of the reference, normals agree to 1e-6. For that the angle is rounded where the reference
rounds it. Sine and cosine are our own: libdevice's take any float32, with a slow path that needs a stack; an angle
within (0, 2π) is reduced by two fused multiply-adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import MAX_GRID_Y, Config, Table, alignment, hint, jit, on_device, tl, tuned

# --- device functions --------------------------------------------------------------------------------------------


@jit
def philox_counter(sample_ids):  # type: ignore[no-untyped-def]
    """Lower and upper word of int64 sample ids, as the int32 that `tl.philox` takes for its last two counters."""
    low = (sample_ids & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return low, (sample_ids >> 32).to(tl.int32)


@jit
def four_normals(seed, block, low, high):  # type: ignore[no-untyped-def]
    """Elements 4·block … 4·block+3 of a sample, as four tensors; block, low and high broadcast to one shape."""
    nought = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, nought, nought + low, nought + high)
    a, b = _box_muller(w0, w1)
    c, d = _box_muller(w2, w3)
    return a, b, c, d


@jit
def normals_in_fours(seed, block, low, high):  # type: ignore[no-untyped-def]
    """The elements of `block` (rows, columns) side by side: (rows, 4·columns)."""
    a, b, c, d = four_normals(seed, block, low, high)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def _uniforms_in_fours(seed, block, low, high):  # type: ignore[no-untyped-def]
    """`normals_in_fours` for uniforms: of each word itself."""
    nought = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, nought, nought + low, nought + high)
    return tl.interleave(tl.interleave(_uniform(w0), _uniform(w2)), tl.interleave(_uniform(w1), _uniform(w3)))


@jit
def normals_one_by_one(seed, element, low, high):  # type: ignore[no-untyped-def]
    """For elements in no order: each pays for a Philox block and one pair of normals."""
    nought = element * 0
    w0, w1, w2, w3 = tl.philox(seed, element // 4, nought, nought + low, nought + high)
    upper = (element & 2) != 0
    a, b = _box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1))
    return tl.where((element & 1) != 0, b, a)


@jit
def _box_muller(w0, w1):  # type: ignore[no-untyped-def]
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(w0)))
    cos, sin = _cos_sin(6.2831854820251465 * _uniform(w1))  # 2π in float32
    return radius * cos, radius * sin


@jit
def _uniform(words):  # type: ignore[no-untyped-def]
    """`((x >> 9) + 1/2) / 2^23` without an integer conversion: 1 + m/2^23 by its bits, less 1 - 2^-24; both exact."""
    ones = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return ones - 0.999999940395355224609375


@jit
def _cos_sin(angle):  # type: ignore[no-untyped-def]
    """Cosine and sine of float32 in [0, 2π], to about one unit in the last place.

    Quarter turns are taken off first. π/2 is split so that the first part times 0 … 4 is exact with or without an FMA;
    explicit FMAs keep the compiler from fusing the caller's product, which would skip the rounding of the angle. The
    polynomials in r² are minimax on |r| <= π/4 (fitted in float64; errors 1.2e-8 of sine, 8e-10 of cosine).
    """
    shifted = tl.fma(angle, 0.6366197466850281, 12582912.0)  # 2/π; + 1.5·2^23 leaves the integer in the lowest bits
    quarters = shifted - 12582912.0
    r = tl.fma(quarters, -1.5707969665527344, angle)
    r = tl.fma(quarters, 6.397578431460715e-07, r)
    z = r * r
    sine = tl.fma(tl.fma(-1.95879176e-4, z, 8.33274845e-3), z, -0.166666646619)
    sine = tl.fma(sine * z, r, r)
    cosine = tl.fma(tl.fma(2.454789249567e-5, z, -1.388830265744e-3), z, 4.166666465139e-2)
    cosine = tl.fma(cosine, z * z, tl.fma(z, -0.5, 1.0))
    turn = shifted.to(tl.int32, bitcast=True)
    odd = (turn & 1) != 0
    return _flip(tl.where(odd, sine, cosine), turn + 1), _flip(tl.where(odd, cosine, sine), turn)


@jit
def _flip(x, turn):  # type: ignore[no-untyped-def]
    """x with its sign turned where bit 1 of `turn` is set."""
    return (x.to(tl.int32, bitcast=True) ^ ((turn & 2) << 30)).to(tl.float32, bitcast=True)


# --- a tensor of them --------------------------------------------------------------------------------------------


@jit
def _draw_kernel(  # type: ignore[no-untyped-def]
    out_ptr, ids_ptr, seed_ptr, count, UNIFORM: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (c, s) writes the c-th 4·BLOCK elements of sample s."""
    count = hint(count, ALIGN)
    sample = tl.program_id(1).to(tl.int64)
    low, high = philox_counter(tl.load(ids_ptr + sample))
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if UNIFORM:
        values = _uniforms_in_fours(tl.load(seed_ptr), block[None, :], low, high)
    else:
        values = normals_in_fours(tl.load(seed_ptr), block[None, :], low, high)
    element = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)[None, :]
    tl.store(out_ptr + sample * count + element, values, mask=element < count)


# Keyed on elements a sample. Provisional: not yet tuned on a GPU.
DRAW: Table = {0: ((256, Config((("BLOCK", 64),), num_warps=1)), (2**34, Config((("BLOCK", 512),), num_warps=4)))}


def draw(sample_ids: Tensor, seed: Tensor, count: int, *, uniform: bool) -> Tensor:
    """(batch, count) float32 normals or uniforms; see `reference.philox_normal` and `reference.philox_uniform`."""
    out = torch.empty((sample_ids.shape[0], count), dtype=torch.float32, device=sample_ids.device)
    if out.numel():
        config = tuned(DRAW, count, out.device)
        with on_device(out):
            for first in range(0, out.shape[0], MAX_GRID_Y):
                rows = out[first : first + MAX_GRID_Y]
                grid = (-(-count // (4 * config.options["BLOCK"])), rows.shape[0])
                _draw_kernel[grid](
                    rows, sample_ids[first:].contiguous(), seed, count,
                    UNIFORM=uniform, ALIGN=alignment(count), **config.options,
                )  # fmt: skip
    return out
