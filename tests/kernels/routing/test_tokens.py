"""Token routing: the ops against their definitions, the bytes they move, and what the kernels compile to."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import prx_kernels
from prx_kernels import (
    enter_route,
    exit_route,
    gather_tokens,
    kept_tokens,
    sample_keep,
    scatter_tokens,
)
from prx_kernels.routing import tokens as module

from ..conftest import ROOT
from . import checks

BATCH, TOKENS, KEPT, WIDTH = 2, 8, 4, 3


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    keep = checks.random_keep(BATCH, TOKENS, KEPT, "cpu")
    return rows(BATCH, TOKENS, WIDTH), rows(BATCH, KEPT, WIDTH), keep


# --- sample_keep -------------------------------------------------------------------------------------------------


def test_every_token_and_every_pair_is_kept_equally_often():
    batch, tokens, kept = 20_000, 16, 8
    keep = sample_keep(torch.arange(batch), tokens, 0.5, seed=torch.tensor(1))
    chosen = torch.zeros(batch, tokens).scatter_(1, keep.long(), 1.0)
    counts, p = chosen.sum(0), kept / tokens
    # Counts of a fixed-size subset are anticorrelated, which (N-1)/N puts right: chi-square of N-1 degrees.
    chi2 = ((counts - batch * p) ** 2).sum() / (batch * p * (1 - p)) * (tokens - 1) / tokens
    assert chi2 < 37.7  # 0.1 % quantile of 15 degrees of freedom
    pairs = (chosen.T @ chosen)[tuple(torch.triu_indices(tokens, tokens, 1))]
    p = kept * (kept - 1) / (tokens * (tokens - 1))
    z = (pairs - batch * p) / (batch * p * (1 - p)) ** 0.5
    assert z.abs().max() < 4.5  # 120 pairs at 7e-6 each: 0.1 %
    assert 0.6 < z.square().mean() < 1.5


def test_sets_differ_over_samples_and_seeds_and_not_over_world_sizes():
    ids = torch.arange(64)
    sets = [sample_keep(ids, 32, 0.5, seed=torch.tensor(s)) for s in (0, 1, 2**40)]
    assert len({tuple(row) for row in torch.cat(sets).tolist()}) == 3 * 64
    for world in (2, 8):
        shards = [sample_keep(part, 32, 0.5, seed=torch.tensor(0)) for part in ids.chunk(world)]
        assert torch.equal(torch.cat(shards), sets[0])


@pytest.mark.parametrize(("tokens", "ratio"), [(2, 0.5), (9, 0.01), (9, 0.99), (256, 0.5), (16384, 0.5), (77, 0.3)])
def test_sets_are_sorted_unique_and_of_the_stated_size(tokens, ratio):
    keep = sample_keep(torch.arange(3), tokens, ratio, seed=torch.tensor(5))
    assert keep.dtype == torch.int32
    assert keep.shape == (3, tokens - min(max(round(tokens * ratio), 1), tokens - 1)) == (3, kept_tokens(tokens, ratio))
    assert (keep[:, 1:] > keep[:, :-1]).all()
    assert keep.min() >= 0
    assert keep.max() < tokens


def test_twenty_steps_with_changing_seeds_compile_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, ids, seed):
        y, byp = enter_route(x, sample_keep(ids, TOKENS, 0.5, seed=seed))
        return exit_route(y * 2, byp, sample_keep(ids, TOKENS, 0.5, seed=seed))

    ids, x = torch.arange(BATCH), torch.ones(BATCH, TOKENS, WIDTH)
    results = {str(step(x, ids, torch.tensor(s)).tolist()) for s in range(20)}
    assert counter.frame_count == 1
    assert len(results) > 15


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_of_each_op_to_second_order(tensors):
    x, y, keep = tensors
    for function, arguments in (
        (gather_tokens, (x, keep)),
        (scatter_tokens, (x, y, keep)),
        (enter_route, (x, keep)),
        (exit_route, (y, x, keep)),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def pair(x, keep):
    y, byp = enter_route(x, keep)
    return exit_route(y.tanh() * 2, byp, keep)


def skip_around(x, keep):
    return pair(x, keep) + x.square()


def skip_from_inside(x, keep):
    y, byp = enter_route(x, keep)
    return exit_route(y.tanh(), byp, keep) * x + byp.square()


@pytest.mark.parametrize("function", [pair, skip_around, skip_from_inside])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_pair_with_a_parallel_use_of_x_or_byp(tensors, function, compiled):
    x, _, keep = tensors
    if not compiled:
        assert torch.autograd.gradcheck(function, (x, keep))
        return
    run = torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition")
    (actual,) = torch.autograd.grad(run(x, keep).sin().sum(), x)
    (expected,) = torch.autograd.grad(function(x, keep).sin().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["gather", "scatter", "spread", "clear", "add", "clear_", "add_", "sample_keep"])
def test_opcheck(tensors, name):
    x, y, keep = tensors
    arguments = {
        "gather": (x, keep), "scatter": (x, y, keep), "spread": (y, keep, TOKENS), "clear": (x, keep),
        "add": (x, y, keep), "clear_": (x.detach(), keep), "add_": (x.detach(), y.detach(), keep),
        "sample_keep": (torch.arange(3), torch.tensor(4), 9, 5),
    }[name]  # fmt: skip
    torch.library.opcheck(getattr(module, f"_{name}"), arguments)


# --- bytes -------------------------------------------------------------------------------------------------------

# Rows read and written by each op for N tokens of which K are kept (`routing/kernels.py`), indices left out.
ROWS = {
    "gather_tokens": lambda n, k: 2 * k,
    "scatter_tokens": lambda n, k: (k + (n - k)) + n,
    "spread_tokens": lambda n, k: k + n,
    "clear_tokens": lambda n, k: (n - k) + n,
    "add_tokens": lambda n, k: (n + k) + n,
    "clear_tokens_": lambda n, k: k,
    "add_tokens_": lambda n, k: 2 * k + k,
}


class CountBytes(TorchDispatchMode):
    """Bytes of floating tensors that ops read and write; views are free, an op not in ROWS reads and writes in full."""

    def __init__(self, tokens: int, kept: int) -> None:
        super().__init__()
        self.sizes, self.bytes, self.seen = (tokens, kept), 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, name = function._schema.name.split("::")
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if namespace == "prx":
            row = tensors[0].shape[0] * tensors[0].shape[2] * tensors[0].element_size()
            self.bytes += ROWS[name](*self.sizes) * row
        elif not function.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        self.seen.append(name)
        return result


def test_eager_pair_moves_eight_passes_forward_and_backward():
    x, grad = (torch.randn(4, 64, 32, requires_grad=i == 0) for i in range(2))
    keep = sample_keep(torch.arange(4), 64, 0.5, seed=torch.tensor(0))
    u = x.numel() * x.element_size()
    with CountBytes(64, 32) as count:
        y, byp = enter_route(x, keep)
        out = exit_route(y, byp, keep)
    assert count.bytes == 3 * u
    before = grad.clone()
    with count:
        torch.autograd.grad(out, x, grad)
    assert count.bytes <= 8 * u
    assert not {"zeros", "zeros_like", "new_zeros", "fill_", "zero_", "add", "add_"} & set(count.seen)
    assert torch.equal(grad, before), "an incoming gradient was written to"


def test_compiled_pair_moves_six_passes_forward_and_backward():
    """In the code that Inductor wrote, where the gradients' buffers are reused and nothing is cloned."""
    from torch._inductor.utils import run_and_get_code

    def layer(x, keep, weight):
        y, byp = enter_route(x @ weight, keep)
        return (exit_route(torch.tanh(y @ weight), byp, keep) @ weight).sum()

    weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    keep = sample_keep(torch.arange(2), 8, 0.5, seed=torch.tensor(0))
    expected = torch.autograd.grad(layer(x, keep, weight), (x, weight))

    def step():
        return torch.autograd.grad(torch.compile(layer, fullgraph=True)(x, keep, weight), (x, weight))

    torch._dynamo.reset()
    actual, codes = run_and_get_code(step)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    ops = [
        name for code in codes for name in re.findall(r"^ *(?:\w+ = )?torch\.ops\.prx\.(\w+)\.default\(", code, re.M)
    ]
    assert sorted(ops) == ["add_tokens_", "clear_tokens_", "gather_tokens", "gather_tokens", "scatter_tokens"]
    assert sum(ROWS[name](8, 4) for name in ops) <= 6 * 8
    assert not any("clone" in code for code in codes)


# --- layouts, dtypes, errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64])
def test_dtypes_and_trailing_dimensions_are_kept(dtype):
    x = torch.randn(2, 6, 3, 2).to(dtype)
    keep = checks.random_keep(2, 6, 4, "cpu")
    taken = gather_tokens(x.transpose(2, 3), keep)
    assert taken.dtype == dtype
    assert torch.equal(taken, x.transpose(2, 3)[torch.arange(2)[:, None], keep.long()])


def test_a_join_of_two_dtypes_has_the_common_one():
    keep = checks.random_keep(1, 4, 2, "cpu")
    out = exit_route(torch.ones(1, 2, 3), torch.zeros(1, 4, 3, dtype=torch.bfloat16), keep)
    assert out.dtype == torch.float32


KEEP = torch.tensor([[0, 2]], dtype=torch.int32)
X = torch.zeros(1, 4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gather_tokens(X, KEEP + 2), IndexError, "keep holds index 4, outside the 4 tokens of x"),
        (lambda: enter_route(X, KEEP - 1), IndexError, "keep holds index -1, outside the 4 tokens of x"),
        (lambda: exit_route(X[:, :2], X, KEEP + 2), IndexError, "keep holds index 4"),
        (lambda: gather_tokens(X, KEEP.float()), TypeError, "keep must be int32 or int64, got torch.float32"),
        (lambda: gather_tokens(X, KEEP[:, :0]), ValueError, "0 < K <= tokens"),
        (lambda: enter_route(X, KEEP[0]), ValueError, r"keep must be \(batch, K\)"),
        (lambda: exit_route(X, X, KEEP), ValueError, r"must have shape \(1, 2, 3\) to go where keep says"),
        (lambda: sample_keep(KEEP[0], 4, 0.5, seed=torch.tensor(0)), TypeError, "must be int64 tensors"),
        (lambda: sample_keep(torch.arange(2), 4, 0.5, seed=3), TypeError, "must be int64 tensors, got int"),
        (lambda: sample_keep(torch.arange(2), 4, 1.0, seed=torch.tensor(0)), ValueError, r"lies in \(0, 1\), got 1.0"),
        (lambda: sample_keep(torch.arange(2), 4, 0.0, seed=torch.tensor(0)), ValueError, r"lies in \(0, 1\), got 0.0"),
        (lambda: sample_keep(torch.arange(2), 1, 0.5, seed=torch.tensor(0)), ValueError, "at least 2 tokens, got 1"),
        (lambda: sample_keep(torch.arange(2), 16385, 0.5, seed=torch.tensor(0)), ValueError, "at most 16384 tokens"),
        (lambda: sample_keep(torch.arange(2), 4, 0.5, seed=torch.arange(2)), ValueError, "seed one element"),
    ],
)
def test_errors_are_sentences(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- kernels -----------------------------------------------------------------------------------------------------


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_token_routing.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(dtype):
    for shape in (*checks.SHAPES, (4, 1024, 512, 1792), (2, 4096, 2048, 1152)):
        checks.check_copies(shape, dtype, "cuda")
    for tokens, kept in ((2, 1), (7, 4), (256, 128), (1000, 333), (5000, 2500), (16384, 8192)):
        checks.check_sample_keep(tokens, kept, "cuda")
    checks.check_ties("cuda")
    checks.check_addresses_beyond_32_bits("cuda")
    checks.check_index_out_of_range("cuda")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_without_spills_and_copy_by_sixteen_bytes(arch):
    pytest.importorskip("triton")
    from .. import ahead_of_time
    from . import builds

    copies = list(builds.copies(arch))
    for name, made in (*copies, *builds.sample_keep(arch)):
        print(f"sm_{arch} {name}: {made.registers} registers, {made.stack} spilled, {made.shared} bytes shared")
        assert made.stack == 0, name
        assert made.shared <= ahead_of_time.MAX_SHARED, name
    for name, made in copies:
        assert set(made.accesses("st")) == {16}, name
        # At most four indices a thread, of 4 bytes each; everything else is rows.
        assert set(made.accesses("ld")) <= {4, 16}, name
        assert made.accesses("ld").count(4) <= 4, name
        assert 16 in made.accesses("ld") or name.endswith("add=False"), name


# --- the package -------------------------------------------------------------------------------------------------


def test_a_copy_under_another_name_loads_beside_this_one(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "prx_kernels", tmp_path / "kernels_copy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(tmp_path)
    twin = importlib.import_module("kernels_copy")
    assert twin.__all__ == prx_kernels.__all__
    arguments = (torch.arange(2), 16, 0.5)
    seed = torch.tensor(3)
    assert torch.equal(twin.sample_keep(*arguments, seed=seed), sample_keep(*arguments, seed=seed))
    assert hasattr(torch.ops.kernels_copy, "gather_tokens")
    for name in [n for n in sys.modules if n.partition(".")[0] == "kernels_copy"]:
        assert "prx_kernels" not in getattr(sys.modules[name], "__file__", "")


def test_without_triton_the_definitions_run():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, prx_kernels as k\n"
        "keep = k.sample_keep(torch.arange(2), 8, 0.5, seed=torch.tensor(0))\n"
        "y, byp = k.enter_route(torch.ones(2, 8, 3), keep); print(k.exit_route(2 * y, byp, keep).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "72.0", done.stderr
