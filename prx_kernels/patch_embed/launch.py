"""What launches the patch embedding's kernels: tile tables, the split of a sum that is too long, noise arguments.

One product is a launch here, and a patch embedding is two products: the second, bottleneck to hidden, is the BLAS
library's. On an H200 at B 32, 512 px (8,192 tokens, 3072 -> 256 -> 1792, bfloat16), by arithmetic:

- Training needs the bottleneck row in memory anyway, for the second weight's gradient: 4 MB against 50 to 100 MB of
  pixels. One kernel for both products would save reading it back from L2 and a launch, a few of some 50 µs.
- A tile spans the whole bottleneck, so that pixels are read once and noise, which costs about 50 instructions a pixel
  and takes as long as the product itself, is formed once.
- Tiles of 128 tokens are 64, for 132 SMs. Tiles of 64 tokens are 128, but then the first weight goes through L2 128
  times: 201 MB, at 5 to 6 TB/s longer than the matrix work. Splitting the 3072 features in two also makes 128
  programs, at 101 MB of weight and 34 MB of partial sums, which stay in L2 and are added in a fixed order.
- At B 16, 1024 px there are 128 tiles of 128 tokens: no split, and rows are written once, in their final dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, on_device, tuned
from ..pixel_loss.kernels import picture_geometry
from . import kernels

# --- tables ------------------------------------------------------------------------------------------------------


def _tile(rows: int, cols: int, depth: int, warps: int, stages: int) -> Config:
    return Config((("ROWS", rows), ("COLS", cols), ("DEPTH", depth)), warps, stages)


_ANY = 2**31
# Keyed on the bottleneck, which the columns of a tile span up to 256. Provisional: not yet tuned on a GPU.
# Other architectures get at most 99 KB of shared memory, what consumer cards have.
_PORTABLE = ((64, _tile(64, 64, 32, 4, 3)), (_ANY, _tile(64, 128, 32, 8, 3)))
_HOPPER = ((64, _tile(128, 64, 64, 4, 3)), (128, _tile(128, 128, 64, 8, 3)), (_ANY, _tile(128, 256, 64, 8, 3)))
# Noise needs registers beside the accumulator: half the depth, or it spills.
_HOPPER_NOISE = ((64, _tile(128, 64, 32, 8, 4)), (128, _tile(128, 128, 32, 8, 4)), (_ANY, _tile(128, 256, 32, 8, 4)))
# So do pixels apart from one another (channels last), which are loaded one by one, and noise that is drawn one by one,
# where four does not divide the patch: half the tokens.
_HOPPER_SINGLE = ((64, _tile(64, 64, 32, 4, 4)), (128, _tile(64, 128, 32, 4, 4)), (_ANY, _tile(64, 256, 32, 8, 4)))
PROJECT: Table = {0: _PORTABLE, 90: _HOPPER}
PROJECT_NOISE: Table = {0: _PORTABLE, 90: _HOPPER_NOISE}
PROJECT_SINGLE: Table = {0: _PORTABLE, 90: _HOPPER_SINGLE}


def _turned(table: Table) -> Table:
    """The same tiles for the weight's gradient, whose rows are the bottleneck and whose depth runs over tokens."""

    def turn(config: Config) -> Config:
        size = dict(config.tile)
        return _tile(size["COLS"], size["ROWS"], size["DEPTH"], config.num_warps, config.num_stages)

    return {arch: tuple((limit, turn(config)) for limit, config in rows) for arch, rows in table.items()}


WEIGHT: Table = _turned(PROJECT)
WEIGHT_NOISE: Table = _turned(PROJECT_NOISE)
WEIGHT_SINGLE: Table = _turned(PROJECT_SINGLE)
# Keyed on nothing: a product with a short sum, whose time is that of writing the picture.
IMAGE: Table = {0: ((_ANY, _tile(64, 128, 32, 4, 3)),)}
# Float32 products are IEEE, without matrix units (autocast is there for speed): both operands are in registers.
FLOAT: Table = {0: ((_ANY, _tile(32, 64, 32, 4, 2)),)}
SUM_PARTS: Table = {0: ((_ANY, Config((("BLOCK", 1024),), num_warps=4)),)}
_SMS = 132  # of an H200; for the interpreter
_MAX_SPLITS = 32


# --- launchers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What `x_t` is formed of beside the picture: t (batch,) float32, seed and sample ids int64, on its device."""

    t: Tensor
    seed: Tensor
    sample_ids: Tensor
    scale: float


def project(image: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, noise: Noise | None) -> Tensor:
    """Patches of the picture, noisy where asked, times weightᵀ plus bias: (batch, N, bottleneck), dtype of weight."""
    weight = weight.contiguous()
    bottleneck, features = weight.shape
    grid, strides = picture_geometry(image, patch_size)
    out = torch.empty((image.shape[0], grid[0], bottleneck), dtype=weight.dtype, device=image.device)
    rows = out.shape[0] * out.shape[1]
    if out.numel() == 0:
        return out
    table = product_table((PROJECT, PROJECT_NOISE, PROJECT_SINGLE), noise is not None, patch_size, strides[3])
    size = _config(table, weight, bottleneck)
    row_tiles, col_tiles = _tiles(rows, size, "ROWS"), _tiles(bottleneck, size, "COLS")
    splits, steps = _split(row_tiles * col_tiles, _tiles(features, size, "DEPTH"), image.device)
    parts = _parts(splits, out)
    with on_device(image):
        kernels.project_kernel[(row_tiles, col_tiles, splits)](
            parts, image, weight, weight if bias is None else bias.contiguous(), *_noise_pointers(noise, weight),
            rows, features, bottleneck, *grid, *strides, noise.scale if noise else 1.0, steps,
            FOURS=patch_size % 4 == 0, BIAS=bias is not None and splits == 1, PARTIAL=splits > 1,
            **_constants(patch_size, noise is not None, features, bottleneck, strides), **size.options,
        )  # fmt: skip
    return _sum_parts(out, parts, bias)


def weight_gradient(grad: Tensor, image: Tensor, patch_size: int, noise: Noise | None) -> Tensor:
    """gradᵀ·patches: (bottleneck, channels·p²), dtype of grad, float32 sums; noise is formed again."""
    grad = grad.contiguous()
    bottleneck, features = grad.shape[2], image.shape[1] * patch_size**2
    grid, strides = picture_geometry(image, patch_size)
    rows = grad.shape[0] * grad.shape[1]
    out = torch.empty((bottleneck, features), dtype=grad.dtype, device=grad.device)
    if rows == 0:
        return out.zero_()
    table = product_table((WEIGHT, WEIGHT_NOISE, WEIGHT_SINGLE), noise is not None, patch_size, strides[3])
    size = _config(table, grad, bottleneck)
    col_tiles, row_tiles = _tiles(features, size, "COLS"), _tiles(bottleneck, size, "ROWS")
    splits, steps = _split(row_tiles * col_tiles, _tiles(rows, size, "DEPTH"), image.device)
    parts = _parts(splits, out)
    with on_device(image):
        kernels.weight_gradient_kernel[(col_tiles, row_tiles, splits)](
            parts, grad, image, *_noise_pointers(noise, grad), rows, features, bottleneck, *grid, *strides,
            noise.scale if noise else 1.0, steps, FOURS=patch_size % 4 == 0, PARTIAL=splits > 1,
            **_constants(patch_size, noise is not None, features, bottleneck, strides), **size.options,
        )  # fmt: skip
    return _sum_parts(out, parts, None)


def image_gradient(grad: Tensor, weight: Tensor, t: Tensor | None, like: Tensor, patch_size: int) -> Tensor:
    """grad·weight put back in place, times 1-t where t is given: a dense tensor of shape and dtype of `like`."""
    grad, weight = grad.contiguous(), weight.contiguous()
    bottleneck, features = weight.shape
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    rows = grad.shape[0] * grad.shape[1]
    if out.numel() == 0:
        return out
    size = _config(IMAGE, grad, bottleneck)
    (tokens, columns, width, plane), strides = picture_geometry(out, patch_size)
    with on_device(out):
        kernels.image_gradient_kernel[(_tiles(rows, size, "ROWS"), _tiles(features, size, "COLS"))](
            out, grad, weight, grad if t is None else t.contiguous(), rows, features, bottleneck, tokens, columns,
            width, plane, strides[0],
            **_constants(patch_size, t is not None, features, bottleneck, strides), **size.options,
        )  # fmt: skip
    return out


def _parts(splits: int, out: Tensor) -> Tensor:
    """Where a product writes: `out` itself, or a float32 sum for each split of its depth."""
    return out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def _sum_parts(out: Tensor, parts: Tensor, bias: Tensor | None) -> Tensor:
    if parts is out:
        return out
    count, width = out.numel(), out.shape[-1]
    size = tuned(SUM_PARTS, 0, out.device)
    with on_device(out):
        kernels.sum_parts_kernel[(_tiles(count, size, "BLOCK"),)](
            out, parts, out if bias is None else bias.contiguous(), count, width, parts.shape[0],
            BIAS=bias is not None, ALIGN=alignment(count), **size.options,
        )  # fmt: skip
    return out


def _constants(
    patch_size: int, noise: bool, features: int, bottleneck: int, strides: tuple[int, int, int, int]
) -> dict[str, int]:
    """What all three products are compiled for."""
    return {
        "P": patch_size,
        "NOISE": noise,
        "ALIGN": alignment(features, bottleneck),
        "PIXELS": alignment(*strides[:3]),
    }


def _noise_pointers(noise: Noise | None, absent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if noise is None:
        return absent, absent, absent
    return noise.t.contiguous(), noise.sample_ids.contiguous(), noise.seed


def _config(table: Table, operand: Tensor, bottleneck: int) -> Config:
    return tuned(FLOAT if operand.dtype == torch.float32 else table, bottleneck, operand.device)


def product_table(tables: tuple[Table, Table, Table], noise: bool, patch_size: int, column_stride: int) -> Table:
    """Of the tables for clean pixels, for noise in fours and for what goes one by one, that of this product."""
    if column_stride != 1 or (noise and patch_size % 4):
        return tables[2]
    return tables[1 if noise else 0]


def _tiles(size: int, config: Config, name: str) -> int:
    return -(-size // config.options[name])


def _split(tiles: int, steps: int, device: torch.device) -> tuple[int, int]:
    """Into how many programs to cut the sum over `steps` of each tile so that every SM has one, and steps of each."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _SMS
    wanted = max(1, min(sms // tiles, steps // 4, _MAX_SPLITS))  # below four steps a pipeline does not fill
    each = -(-steps // wanted)
    return -(-steps // each), each
