"""Residual, gate, LayerNorm and modulation in one pass: against plain PyTorch, and what the kernels become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prx_kernels import norm_modulate, residual_gate_norm_modulate
from prx_kernels.blocks import modulation as module

from . import checks

BATCH, TOKENS, WIDTH = 2, 3, 4


def make(dtype: torch.dtype = torch.float64, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    projection = torch.randn(batch, 6 * WIDTH, generator=generator).to(dtype)
    return x.requires_grad_(), branch.requires_grad_(), projection.requires_grad_()


def half_blocks(x: Tensor, branch: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
    """As the model has it: two norms between three uses of the stream, the second read by two products."""
    x, h = norm_modulate(x, projection[:, : 2 * WIDTH], eps=checks.EPS)
    y, first, second = residual_gate_norm_modulate(x, branch * h, projection[:, 2 * WIDTH : 5 * WIDTH], eps=checks.EPS)
    return y, first.sin(), second.cos(), x * 2


def written_out(x: Tensor, branch: Tensor, projection: Tensor) -> tuple[Tensor, ...]:
    shift, scale, gate, next_shift, next_scale, _ = projection[:, None].chunk(6, dim=-1)
    h = F.layer_norm(x, x.shape[-1:], eps=checks.EPS) * (1 + scale) + shift
    y = x + gate * (branch * h)
    h = F.layer_norm(y, x.shape[-1:], eps=checks.EPS) * (1 + next_scale) + next_shift
    return y, h.sin(), h.cos(), x * 2


@pytest.mark.parametrize("batch", [BATCH, 1])
@pytest.mark.parametrize("compiled", [False, True])
def test_they_are_the_formulas_and_their_gradients(batch, compiled):
    given = make(batch=batch)
    torch._dynamo.reset()
    run: Any = torch.compile(half_blocks, fullgraph=True, backend="aot_eager") if compiled else half_blocks
    actual, expected = run(*given), written_out(*given)
    incoming = [
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(actual)
    ]
    gradients = []
    for outputs in (actual, expected):
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b)
        gradients.append(torch.autograd.grad(outputs, given, incoming))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    x, branch, projection = make()
    assert torch.autograd.gradcheck(half_blocks, (x, branch, projection))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 2), (1, 2, 3)])
def test_gradients_where_some_outputs_are_not_used(used):
    given = make()
    results = [f(*given) for f in (half_blocks, written_out)]
    gradients = [
        torch.autograd.grad([out[i].square().sum() for i in used], given, allow_unused=True) for out in results
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("used", [0, 1])
def test_a_norm_of_which_one_output_is_used(used):
    x, _, projection = make()
    shift, scale, *_ = projection[:, None].chunk(6, dim=-1)
    plain = x, F.layer_norm(x, (WIDTH,), eps=checks.EPS) * (1 + scale) + shift
    outputs = norm_modulate(x, projection[:, : 2 * WIDTH], eps=checks.EPS)[used], plain[used]
    actual, expected = (torch.autograd.grad(out.square().sum(), x)[0] for out in outputs)
    torch.testing.assert_close(actual, expected)


def test_the_stream_passes_through_without_a_copy():
    x, _, projection = make()
    same, h = norm_modulate(x, projection[:, : 2 * WIDTH])
    assert same.data_ptr() == x.data_ptr()
    y, first, second = residual_gate_norm_modulate(same, h, projection[:, : 3 * WIDTH])
    assert first.data_ptr() == second.data_ptr() != y.data_ptr()


def test_opcheck():
    x, branch, projection = (t.detach() for t in make(torch.float32))
    two, three = projection[:, : 2 * WIDTH], projection[:, : 3 * WIDTH]
    # Their gradients are given by Functions: no formula of their own.
    plain = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(module._norm_modulate, (x, two, 1e-6), **plain)
    torch.library.opcheck(module._residual_modulate, (x, branch, three, 1e-6), **plain)
    for grad, again in ((x, branch), (x, None), (None, None)):
        torch.library.opcheck(module._backward, (grad, x, again, x, branch, three, 1e-6), **plain)
        torch.library.opcheck(module._backward, (grad, x, again, x, None, two, 1e-6), **plain)


def test_stream_and_branch_of_two_dtypes_give_the_common_one():
    x, branch, projection = make(torch.float32)
    y, h, _ = residual_gate_norm_modulate(x, branch.bfloat16(), projection[:, : 3 * WIDTH].bfloat16())
    assert y.dtype == h.dtype == torch.float32
    (y.sum() + h.square().sum()).backward()
    assert x.grad is not None
    assert projection.grad is not None


X, M = torch.zeros(2, 3, 4), torch.zeros(2, 12)
WIDE = torch.zeros(1, 1, 8200)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "width": (lambda: norm_modulate(X, M), ValueError, r"\(1 or batch, 2·C\) .* \(2, 3, 4\), got \(2, 12\)"),
    "batch": (lambda: residual_gate_norm_modulate(X[:1], X[:1], M), ValueError, r"3·C\).*got \(2, 12\)"),
    "branch": (
        lambda: residual_gate_norm_modulate(X, X[:, :2], M), ValueError, r"of x, \(2, 3, 4\), got \(2, 2, 4\)",
    ),
    "integers": (lambda: norm_modulate(X.int(), M[:, :8]), TypeError, "must be floating, got torch.int32"),
    "integer vectors": (lambda: norm_modulate(X, M[:, :8].int()), TypeError, "float32 and torch.int32"),
    "wide": (lambda: norm_modulate(WIDE, torch.zeros(1, 16400)), ValueError, "8192 elements at most, got 8200"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_sentences(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- kernels (the interpreter's test is in test_qk_norm_rope.py: one run for the folder) ------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(dtype):
    for shape in (*checks.ROWS, (4, 128, 1792), (2, 1024, 1152), (33, 70, 3072), (2, 9, 8192)):
        checks.check_modulation(shape, dtype, "cuda")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_without_spills_and_move_rows_by_sixteen_bytes(arch):
    pytest.importorskip("triton")
    from .. import ahead_of_time
    from . import builds

    made = [*builds.modulation(arch, 2), *(builds.modulation(arch, 4, 4096) if arch == 90 else ())]
    for name, build in made:
        print(f"sm_{arch} {name}: {build.registers} registers, {build.stack} spilled, {build.shared} bytes shared")
        assert build.stack == 0, name
        assert build.shared <= ahead_of_time.MAX_SHARED, name
        assert set(build.accesses("st")) == set(build.accesses("ld")) == {16}, name
