"""The kernels between a block's products under Triton's interpreter, ragged sizes and odd layouts."""

from __future__ import annotations

import pytest
import torch

from prx_kernels.blocks import launch, modulation_kernels
from tests.kernels.blocks import checks


@pytest.mark.parametrize("text", checks.TEXTS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_qk_norm_rope(shape, text):
    checks.check(checks.make(shape, text, torch.float32, "cpu", gaps=True))


@pytest.mark.parametrize("text", checks.TEXTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_qk_norm_rope_in_other_dtypes(dtype, text):
    checks.check(checks.make(checks.SHAPES[2], text, dtype, "cpu", shared=True))


def test_weights_of_another_dtype():
    checks.check(checks.make(checks.SHAPES[1], "padded", torch.float16, "cpu", weights=torch.float32))


def test_programs_of_many_tokens_give_the_same_and_every_time(monkeypatch):
    """As at full size, where a program of the backward takes one token after the other."""
    case = checks.make((2, 9, 3, 8), "packed", torch.float32, "cpu", lengths=(7, 4))
    monkeypatch.setattr(launch, "_MOST_PROGRAMS", 3)
    checks.check(case)
    grads = checks.gradients(case)
    first, second = (launch.backward(*grads, *case.for_backward, False, checks.EPS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_offsets_beyond_the_rows_read_nothing():
    """A wrong table of offsets must not read other memory: what it names is taken to be absent."""
    case = checks.make((2, 2, 2, 8), "packed", torch.float32, "cpu", lengths=(2, 3))
    given = [*case.for_backward, case.txt_length, False, checks.EPS]
    given[6] = torch.tensor([0, 2, 100], dtype=torch.int32)
    _, k, v = launch.forward(*given)
    rows = case.txt_kv.shape[0] - 2
    assert torch.count_nonzero(k[1, rows : case.txt_length]) == torch.count_nonzero(v[1, rows : case.txt_length]) == 0
    assert torch.isfinite(k).all()


@pytest.mark.parametrize("shape", checks.ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_modulation(shape, dtype):
    checks.check_modulation(shape, dtype, "cpu")


def test_modulation_by_vectors_of_another_dtype():
    checks.check_modulation(checks.ROWS[2], torch.float16, "cpu", vectors=torch.float32)


def test_modulation_of_many_rows_a_program(monkeypatch):
    """As at full size, in a fixed order."""
    monkeypatch.setattr(modulation_kernels, "_MOST_PROGRAMS", 4)
    assert modulation_kernels.chunks(2, 19) == (10, 2)
    checks.check_modulation((2, 19, 12), torch.float32, "cpu")


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_geglu(dtype, approximate):
    for shape in ((7,), (3, 5), (2, 3, 70), (2, 2, 1500)):
        checks.check_geglu(shape, dtype, "cpu", approximate)
