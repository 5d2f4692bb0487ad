"""Muon on one device: torch.optim.Muon's numbers, AdamW beside it, gradients that are not finite, kernels."""

from __future__ import annotations

import copy
import inspect
import math
import warnings

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prx_kernels import Muon, newton_schulz, reference
from prx_kernels.muon import optimizer as muon
from prx_kernels.muon.passes import apply_update, momentum_scales, momentum_update, scaled_copy, square_sums

from . import checks
from .training import SHAPES, error, fill_gradients, parameters, run

EXACT = {"ns_algorithm": "standard", "ns_dtype": torch.float32}


def float32_newton_schulz(grad, ns_coefficients, ns_steps, eps):
    steps = (tuple(ns_coefficients),) * ns_steps
    return reference.newton_schulz(grad.double(), steps, restarts=None, dtype=torch.float64).float()


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_follow_torch_optim_muon(adjust_lr_fn, nesterov):
    """torch orthogonalises in bfloat16: at a learning rate of 1e-3 that alone moves a weight by 1e-4 of its size."""
    settings = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    expected, exact, default = parameters(), parameters(), parameters()
    try:
        theirs = torch.optim.Muon(expected, **settings)
    except ValueError as problem:
        if adjust_lr_fn != "spectral_unclamped":  # which torch before 2.15 lacks
            raise
        pytest.skip(f"torch {torch.__version__}: {problem}")
    run(theirs, expected, 20)
    run(Muon(exact, **settings, **EXACT), exact, 20)
    run(Muon(default, **settings), default, 20)
    assert error(exact, expected) <= 1e-3
    assert error(default, expected) <= 1e-3
    # float16 against float32 of our own: no more than a quarter of what bfloat16 costs torch.
    assert error(default, exact) <= 5e-5


@pytest.mark.parametrize("lr", [1e-3, 0.05])
def test_without_torchs_rounding_the_weights_are_its_weights(lr, monkeypatch):
    """Twenty float32 steps: everything but Newton-Schulz' own arithmetic is the same."""
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", float32_newton_schulz)
    expected, exact, default = parameters(), parameters(), parameters()
    settings = {"lr": lr, "adjust_lr_fn": "match_rms_adamw"}
    run(torch.optim.Muon(expected, **settings), expected, 20)
    run(Muon(exact, **settings, **EXACT), exact, 20)
    run(Muon(default, **settings), default, 20)
    assert error(exact, expected) <= 1e-6
    start = parameters()
    for p, q, p0 in zip(default, expected, start, strict=True):  # float16: a part of the change, whatever its size
        assert (p - q).norm() <= 5e-3 * (q - p0).norm()


def test_the_signature_begins_with_that_of_torch_optim_muon():
    theirs = list(inspect.signature(torch.optim.Muon).parameters.values())
    ours = list(inspect.signature(Muon).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.kind for p in ours[: len(theirs)]] == [p.kind for p in theirs]
    different = {p.name for p, q in zip(ours, theirs, strict=False) if p.default != q.default}
    # "jordan" names torch's triple; docs/kernels.md sets the other.
    assert different == {"ns_coefficients", "adjust_lr_fn"}
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_coefficients_by_name_and_by_number_are_the_same():
    named, given, other = parameters(), parameters(), parameters()
    run(Muon(named), named)
    run(Muon(given, 1e-3, 0.1, 0.95, True, (3.4445, -4.7750, 2.0315), 1e-7, 5, "match_rms_adamw"), given)
    run(Muon(other, ns_coefficients="polar_express"), other)
    assert all(torch.equal(p, q) for p, q in zip(named, given, strict=True))
    assert error(other, named) > 1e-4


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_other_groups_run_adamw(weight_decay):
    shapes = [(5,), (3, 4, 2), (4, 6), ()]
    ours, theirs, matrices = (
        parameters([s or (1,) for s in shapes]),
        parameters([s or (1,) for s in shapes]),
        parameters(),
    )
    adamw = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-9, "weight_decay": weight_decay}
    optimizer = Muon([{"params": matrices}, {"params": ours, "use_muon": False, **adamw}], lr=1e-2)
    run(optimizer, [*ours, *matrices], 10)
    expected = torch.optim.AdamW(theirs, **adamw)
    run(expected, theirs, 10)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        state, other = optimizer.state[p], expected.state[q]
        assert state.keys() == other.keys()
        for key in state:
            torch.testing.assert_close(state[key], other[key], rtol=1e-6, atol=1e-7)
    alone = parameters()
    run(Muon(alone, lr=1e-2), [*parameters([s or (1,) for s in shapes]), *alone], 10)
    assert all(torch.equal(p, q) for p, q in zip(alone, matrices, strict=True))


def test_parts_of_a_parameter_are_as_matrices_of_their_own():
    sizes = (32, 32, 20, 12)
    for settings in ({"split_sizes": {"qkv": sizes}}, {"group": sizes}):
        fused = parameters([(96, 32), (24, 32)])
        separate = [nn.Parameter(p.detach().clone()) for p in (*fused[0].split(sizes), fused[1])]
        group = {"params": [("qkv", fused[0])], "split_sizes": settings.pop("group", None)}
        one, many = Muon([group, {"params": [("out", fused[1])]}], **settings), Muon(separate)
        for step in range(3):
            fill_gradients(fused, step)
            for p, grad in zip(separate, (*fused[0].grad.split(sizes), fused[1].grad), strict=True):
                p.grad = grad.clone()
            one.step()
            many.step()
        torch.testing.assert_close(fused[0], torch.cat(separate[:-1]), rtol=0, atol=1e-6)
        torch.testing.assert_close(fused[1], separate[-1], rtol=0, atol=1e-6)
    by_tensor = parameters([(96, 32)])
    run(Muon(by_tensor, split_sizes={by_tensor[0]: (48, 48)}), by_tensor, 1)
    assert not torch.equal(by_tensor[0], parameters([(96, 32)])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_other_dtypes(dtype):
    """float64 is float64 throughout; bfloat16 weights have float32 momentum and are rounded once a step."""
    params, exact = parameters(dtype=dtype), parameters(dtype=torch.float64)
    for p, q in zip(params, exact, strict=True):
        q.data.copy_(p)
    optimizer = Muon(params, lr=1e-2, ns_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {expected}
    other = Muon(exact, lr=1e-2, ns_dtype=torch.float64)
    for step in range(3):
        fill_gradients(params, step)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        other.step()
    assert error([p.double() for p in params], exact) <= (1e-12 if dtype == torch.float64 else 3 * 2**-9)


def test_two_runs_give_the_same_bits():
    first, second = parameters(), parameters()
    run(Muon(first), first)
    run(Muon(second), second)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_one_call_orthogonalises_all_matrices_of_a_group(monkeypatch):
    calls = []
    monkeypatch.setattr(muon, "newton_schulz", lambda G, **_: calls.append(len(G)) or newton_schulz(G))
    params = parameters()
    run(Muon([{"params": params[:4]}, {"params": params[4:], "lr": 0.1}]), params, 1)
    assert calls == [4, len(SHAPES) - 4]


def test_buckets_bound_what_is_held_at_once_and_change_nothing(monkeypatch):
    whole, parts = parameters(), parameters()
    run(Muon(whole), whole)
    monkeypatch.setattr("prx_kernels.muon.exchange.MAX_ELEMENTS", 4000)
    optimizer = Muon(parts)
    assert len(optimizer._plans[0].exchange.buckets) > 2
    run(optimizer, parts)
    assert error(parts, whole) <= 1e-5


# --- clipping and copies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_a_step_clips_as_torch_does_before_it(max_norm):
    """Of both parts; and gradients that somebody else has clipped are taken as they are."""
    shapes = [*SHAPES, (5,)]
    ours, theirs, free = parameters(shapes), parameters(shapes), parameters(shapes)

    def make(params):
        return Muon(
            [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}], lr=0.01, ns_dtype=torch.float32
        )

    one, other, loose = make(ours), make(theirs), make(free)
    for step in range(5):
        for params in (ours, theirs, free):
            fill_gradients(params, step)
        norm = nn.utils.clip_grad_norm_(theirs, max_norm)
        one.step(max_norm=max_norm)
        other.step()
        loose.step()
        torch.testing.assert_close(one.grad_norm, norm)
    assert error(ours, theirs) <= 1e-6
    assert error(free, theirs) > 1e-4 or max_norm > 1e5
    assert other.grad_norm == 0


def test_a_norm_that_is_not_finite_leaves_everything_as_it_was():
    shapes = [*SHAPES, (5,)]
    params = parameters(shapes)
    optimizer = Muon([{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}], lr=0.1)
    run(optimizer, params, 2)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    for bad, where in ((torch.nan, 0), (torch.inf, -1)):
        fill_gradients(params, 2)
        params[where].grad.view(-1)[0] = bad
        optimizer.step(max_norm=1.0)
        assert not optimizer.grad_norm.isfinite()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert optimizer.nonfinite == 2 * len(shapes)


def test_copies_of_weights_follow_them():
    """In the pass that writes the weights; one for some of the matrices changes nothing for the others."""
    shapes = [*SHAPES, (5,)]
    params, plain = parameters(shapes), parameters(shapes)
    optimizers = [Muon([{"params": ps[:-1]}, {"params": ps[-1:], "use_muon": False}], lr=0.1) for ps in (params, plain)]
    copies = {p: torch.zeros(p.shape, dtype=torch.bfloat16) for p in (*params[1:4], params[-1])}
    for step in range(2):
        fill_gradients(params, step)
        fill_gradients(plain, step)
        optimizers[0].step(copies=copies)
        optimizers[1].step()
    assert all(torch.equal(copied, p.bfloat16()) for p, copied in copies.items())
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_gradients_of_any_size_give_the_update_of_their_direction(size):
    """A power of two brings what is orthogonalised into the range of float16, also when its size jumps."""
    params, other = parameters(), parameters()
    optimizers = [Muon(ps, lr=0.01, weight_decay=0.0, momentum=0.5, eps=0.0) for ps in (params, other)]
    for step in range(3):
        fill_gradients(params, 0)
        fill_gradients(other, 0)
        for p in params if step == 1 else ():
            p.grad *= size
        for p in other if step == 1 else ():
            p.grad *= 2.0 ** round(math.log2(size))
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].nonfinite == 0
    assert all(p.isfinite().all() for p in params)
    assert error(params, other) <= 1e-2


# --- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(66, 32), (1, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_bad_gradient_stops_its_matrix_and_nothing_else(bad, shape, nesterov):
    shapes = [shape, (16, 16), (48, 16), (7,)]
    params, clean = parameters(shapes), parameters(shapes)
    optimizers = [
        Muon([{"params": ps[:3]}, {"params": ps[3:], "use_muon": False}], lr=0.1, nesterov=nesterov)
        for ps in (params, clean)
    ]
    for ps, optimizer in zip((params, clean), optimizers, strict=True):
        fill_gradients(ps, 0)
        if ps is params:
            ps[0].grad[-1, -1] = bad
        optimizer.step()
    assert optimizers[0].nonfinite == 1
    assert torch.equal(params[0], parameters(shapes)[0])
    assert optimizers[0].state[params[0]]["momentum_buffer"][-1, -1] == 0
    assert all(torch.equal(p, q) for p, q in zip(params[1:], clean[1:], strict=True))
    run(optimizers[0], params, 2, first=1)
    assert optimizers[0].nonfinite == 1
    assert not torch.equal(params[0], parameters(shapes)[0])
    assert all(p.isfinite().all() for p in params)


def test_a_bad_gradient_of_adamw_leaves_its_part_out():
    params = parameters([(16, 16), (7,), (9,)])
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "use_muon": False}])
    run(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state[params[2]])
    fill_gradients(params, 2)
    params[1].grad[3] = torch.nan
    optimizer.step()
    assert optimizer.nonfinite == 1
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert all(torch.equal(state[key], optimizer.state[params[2]][key]) for key in state)
    run(optimizer, params, 1)
    assert optimizer.state[params[2]]["step"] == 3


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_a_step_reads_nothing_from_the_device():
    """On tensors of a GPU that is not there: whatever asked one for a value would fail."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [*SHAPES, (5,)]]
        optimizer = Muon(
            [
                {"params": params[:3], "lr": torch.tensor(0.1, device="cuda")},
                {"params": params[3:-1]},
                {"params": params[-1:], "use_muon": False},
            ]
        )
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert optimizer.nonfinite.device.type == "cuda"
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            bool(optimizer.nonfinite == 0)


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_muon.py")


@pytest.mark.gpu
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(state):
    for shape in (*checks.SIZES, (1792, 5376)):
        for grad, out in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            checks.check_momentum(shape, grad, state, out, "cuda")
            checks.check_apply(shape, state, out, "cuda")
    checks.check_not_finite("cuda")
    checks.check_layouts("cuda")
    checks.check_squares("cuda")
    checks.check_copy(torch.bfloat16, torch.float16, "cuda")
    checks.check_scales("cuda")
    checks.check_momentum_of_a_step(torch.bfloat16, "cuda")
    checks.check_apply_of_a_step(torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_matrices_beyond_32_bits_on_the_gpu():
    rows = 2**16 + 1
    grad, buffer = (torch.full((rows, 2**15), x, dtype=torch.bfloat16, device="cuda") for x in (1.0, 0.0))
    momentum_update([grad], [buffer], [], 0.5, True)
    assert buffer[-1, -1] == buffer[0, 0] == 0.5
    apply_update([buffer], [grad], [], [1.0], torch.full((), 0.25, device="cuda"), 0.0)
    assert buffer[-1, -1] == buffer[0, 0] == 0.25


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_with_wide_accesses_and_without_spills(arch):
    pytest.importorskip("triton")
    from ..ahead_of_time import MAX_SHARED
    from . import builds

    for name, made in builds.passes(arch):
        assert made.stack == 0, name
        assert made.shared <= MAX_SHARED, name
        if name != "sum":
            scalar, stored = builds.scalars(name)
            assert sorted(made.accesses("ld")) == scalar + [16] * (len(made.accesses("ld")) - len(scalar)), name
            assert sorted(made.accesses("st")) == stored + [16] * (len(made.accesses("st")) - len(stored)), name
            assert 16 in made.accesses("ld"), name


def op_arguments():
    g, b, u, p = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    yield momentum_update, ([g, g[:0]], [b, b[:0]], [u, u[:0]], 0.95, True)
    yield momentum_update, ([g], [b], [], 0.95, True)
    yield apply_update, ([p], [u], [], [0.2], torch.tensor(0.1), 0.1)
    one, scale = torch.tensor(0.5), torch.tensor([2.0])
    yield momentum_update, ([g], [b], [u.half()], 0.95, True, one, scale)
    yield apply_update, ([p], [u.half()], [p.bfloat16()], [0.2], torch.tensor(0.1), 0.1, scale)
    yield square_sums, ([g, p], [2])
    yield momentum_scales, (scale, scale + 1, 0.95, True, one)
    yield scaled_copy, ([g, b], [u.half(), p.half()], [2], scale)


def test_ops_pass_opcheck():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, arguments in op_arguments():
            torch.library.opcheck(op, arguments)


def test_ops_compile_without_a_graph_break():
    for op, arguments in op_arguments():
        expected, made = copy.deepcopy(arguments), copy.deepcopy(arguments)
        op(*expected)
        torch.compile(lambda *a, op=op: op(*a), fullgraph=True, backend="aot_eager")(*made)
        torch.testing.assert_close(made, expected, rtol=0, atol=0)
