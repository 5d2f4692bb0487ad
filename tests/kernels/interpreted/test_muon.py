"""Muon's kernels under Triton's interpreter, ragged sizes and odd layouts, against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.muon import checks

HALF, FULL = torch.float16, torch.float32


@pytest.mark.parametrize("shape", checks.SIZES)
def test_momentum(shape):
    for grad, buffer, out in ((FULL, FULL, FULL), (FULL, FULL, HALF), (HALF, FULL, HALF), (FULL, HALF, FULL)):
        checks.check_momentum(shape, grad, buffer, out, "cpu")


@pytest.mark.parametrize("shape", checks.SIZES)
def test_update(shape):
    for param, update in ((FULL, FULL), (FULL, HALF), (HALF, HALF)):
        checks.check_apply(shape, param, update, "cpu")


def test_entries_that_are_not_finite():
    checks.check_not_finite("cpu")


def test_layouts():
    checks.check_layouts("cpu")


def test_sums_of_squares():
    checks.check_squares("cpu")


@pytest.mark.parametrize(("source", "dtype"), [(FULL, HALF), (HALF, FULL), (FULL, FULL)])
def test_scaled_copies(source, dtype):
    checks.check_copy(source, dtype, "cpu")


def test_scales_are_the_definitions_to_the_bit():
    checks.check_scales("cpu")


def test_a_step_of_the_trainer():
    checks.check_momentum_of_a_step(HALF, "cpu")
    checks.check_apply_of_a_step(HALF, "cpu")
