"""Gated GELU in one pass each way: against plain PyTorch, and what the kernels become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prx_kernels import geglu
from prx_kernels.blocks import gated_gelu as module

from . import checks


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_formula_and_its_gradients(approximate, compiled):
    gate, up = make()
    torch._dynamo.reset()
    run: Any = torch.compile(geglu, fullgraph=True, backend="aot_eager") if compiled else geglu
    outputs = run(gate, up, approximate=approximate), F.gelu(gate, approximate=approximate) * up
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.sin().sum(), (gate, up)) for out in outputs]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gradcheck_on_halves_of_one_projection(approximate):
    both = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: geglu(*x.chunk(2, dim=-1), approximate=approximate), (both,))


def test_it_is_rounded_once():
    gate, up = (x.detach().bfloat16() for x in make(torch.float32))
    gate = gate.clamp(-4, 4)  # far below, 1 + tanh is 0 in float32
    once = (F.gelu(gate.double(), approximate="tanh") * up.double()).bfloat16()
    assert torch.equal(geglu(gate, up), once)
    assert not torch.equal(F.gelu(gate, approximate="tanh") * up, once)


def test_opcheck():
    gate, up = make(torch.float32)
    for approximate in ("tanh", "none"):
        torch.library.opcheck(module._geglu, (gate, up, approximate))
    plain = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(module._backward, (up.detach(), gate.detach(), up.detach(), "tanh"), **plain)


X = torch.zeros(2, 3)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda: geglu(X, X[:, :2]), ValueError, r"\(…, C\), got \(2, 3\) and \(2, 2\)"),
    "numbers": (lambda: geglu(X[0, 0], X[0, 0]), ValueError, r"\(…, C\), got \(\) and \(\)"),
    "dtype": (lambda: geglu(X, X.half()), TypeError, "one dtype, got torch.float32 and torch.float16"),
    "integers": (lambda: geglu(X.int(), X.int()), TypeError, "must be floating"),
    "form": (lambda: geglu(X, X, approximate="fast"), ValueError, "'tanh' or 'none', got 'fast'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_sentences(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- kernels (the interpreter's test is in test_qk_norm_rope.py: one run for the folder) ------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(dtype, approximate):
    for shape in ((7,), (3, 5), (2, 3, 70), (4, 128, 6272), (2, 100, 5000)):
        checks.check_geglu(shape, dtype, "cuda", approximate)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_without_spills_and_move_rows_by_sixteen_bytes(arch):
    pytest.importorskip("triton")
    from . import builds

    for name, build in [*builds.geglu(arch, 2), *builds.geglu(arch, 4)]:
        print(f"sm_{arch} {name}: {build.registers} registers, {build.stack} spilled, {build.shared} bytes shared")
        assert build.stack == 0, name
        assert build.shared == 0, name
        assert set(build.accesses("st")) == set(build.accesses("ld")) == {16}, name
