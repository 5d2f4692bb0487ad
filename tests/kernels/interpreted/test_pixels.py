"""The kernels of noise, patch embedding and loss under Triton's interpreter, against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import pixel_checks as checks


@pytest.mark.parametrize("case", checks.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_products(case, dtype, noisy):
    checks.check_product(case, "fp32" if dtype == torch.float32 else "fp16", dtype, noisy, "cpu")


@pytest.mark.parametrize("kind", ["uint8", "fp32", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("noisy", [False, True], ids=["clean", "noisy"])
def test_products_of_other_pictures(kind, noisy):
    for case in (checks.CASES[0], checks.CASES[3]):
        checks.check_product(case, kind, torch.float16, noisy, "cpu")


@pytest.mark.parametrize("case", checks.CASES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("fp32", torch.float32), ("uint8", torch.float16), ("channels_last", torch.float32)]
)
def test_loss(case, kind, dtype):
    checks.check_loss(case, kind, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale(dtype):
    checks.check_scale(dtype, "cpu")


def test_noise():
    checks.check_noise("cpu")
