"""The kernels of Newton-Schulz under Triton's interpreter, ragged sizes and odd layouts, against their definitions."""

from __future__ import annotations

import pytest
import torch

from prx_kernels.launch import jit, tl
from prx_kernels.newton_schulz import symmetric_kernels as kernels
from tests.kernels.newton_schulz import checks

DESCRIPTOR_CONFIGS = list(kernels.CANDIDATES)
POINTER_CONFIGS = [config for table in (kernels.POINTER, kernels.UNALIGNED, kernels.FLOAT32) for _, config in table[0]]


@jit
def _write_tile(out_ptr, tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
    batch, row, col = kernels._tile(tiles, ROWS, COLS)
    place = out_ptr + 3 * tl.program_id(0)
    tl.store(place, batch)
    tl.store(place + 1, row)
    tl.store(place + 2, col)


@pytest.mark.parametrize("ratio", [1, 2])
def test_tiles_cover_the_upper_triangle_once(ratio):
    side, batch = 20, 2  # in tile columns
    tiles = ratio * side * (side + 1) // 2
    out = torch.full((batch * tiles, 3), -1)
    _write_tile[(batch * tiles,)](out, tiles, ROWS=16, COLS=16 * ratio)
    expected = {(b, 16 * i, 16 * ratio * j) for b in range(batch) for j in range(side) for i in range(ratio * (j + 1))}
    assert {tuple(row) for row in out.tolist()} == expected
    assert len(expected) == len(out)


@pytest.mark.parametrize("shape", checks.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_symmetric_product(shape, dtype):
    checks.check_product(shape, dtype, "cpu")


@pytest.mark.parametrize("config", DESCRIPTOR_CONFIGS)
@pytest.mark.parametrize("shape", checks.ALIGNED)
def test_every_configuration_with_descriptors(shape, config):
    checks.check_config(shape, torch.float16, "cpu", config, tma=True)


@pytest.mark.parametrize("config", [*POINTER_CONFIGS, *(c for _, c in kernels.TMA[90])])
@pytest.mark.parametrize("shape", [(1, 17, 5), (2, 130, 40)])
def test_every_configuration_with_pointers(shape, config):
    checks.check_config(shape, torch.float16, "cpu", config, tma=False)


def test_addresses_beyond_32_bits():
    checks.check_addresses_beyond_32_bits("cpu")


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 17, 33), (6, 64, 80), (6, 300, 231)])
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.float32, torch.float32)],
)
def test_unit_norm(shape, source, dtype):
    checks.check_norm(shape, source, dtype, "cpu")
