"""Every routing kernel under Triton's interpreter, ragged sizes and odd layouts, against its definition."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.routing import checks


@pytest.mark.parametrize("shape", checks.SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies(shape, dtype):
    checks.check_copies(shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_copies_with_int64_indices(dtype):
    checks.check_copies(checks.SHAPES[0], dtype, "cpu", torch.int64)


@pytest.mark.parametrize(
    ("tokens", "kept"), [(2, 1), (3, 2), (7, 4), (64, 1), (257, 128), (1000, 333), (5000, 2500), (16384, 8192)]
)
def test_sample_keep(tokens, kept):
    checks.check_sample_keep(tokens, kept, "cpu")


def test_sample_keep_breaks_ties_by_the_lower_index():
    checks.check_ties("cpu")


def test_addresses_beyond_32_bits():
    checks.check_addresses_beyond_32_bits("cpu")


def test_an_index_out_of_range_gives_nan_and_no_access():
    checks.check_index_out_of_range("cpu")
