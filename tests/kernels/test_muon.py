"""Muon on one device: torch.optim.Muon's numbers and state, AdamW beside it, settings, errors and kernels."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import re
import warnings

import pytest
import torch
import torch.optim._muon as torch_muon
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prx_kernels.muon as muon
from prx_kernels import Muon, assign_owners, newton_schulz, reference
from prx_kernels.muon_owners import Block, shard_rows
from prx_kernels.muon_passes import apply_update, momentum_update

from . import muon_checks as checks

H = 32
SHAPES = [
    (66, 32),
    (3, 40),
    (1, 8),
    (8, 1),
    (3 * H, H),
    (2 * H, H),
    (H, H),
    (6 * H, H),
    (7 * H // 2, H),
    (H, 7 * H // 2),
]
EXACT = {"ns_algorithm": "standard", "ns_dtype": torch.float32}


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    """At the size of PyTorch's initialisation of Linear."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)) for shape in shapes]


def fill_gradients(params, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps=5, first=0) -> None:
    for step in range(first, first + steps):
        fill_gradients(params, step)
        optimizer.step()


def error(made, expected) -> float:
    """The largest relative difference of a weight matrix."""
    with torch.no_grad():
        return max(float((p - q).norm() / q.norm()) for p, q in zip(made, expected, strict=True))


def float32_newton_schulz(grad, ns_coefficients, ns_steps, eps):
    steps = (tuple(ns_coefficients),) * ns_steps
    return reference.newton_schulz(grad.double(), steps, restarts=None, dtype=torch.float64).float()


# --- parity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_twenty_steps_follow_torch_optim_muon(adjust_lr_fn, nesterov):
    """torch orthogonalises in bfloat16: at a learning rate of 1e-3 that alone moves a weight by 1e-4 of its size."""
    settings = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    expected, exact, default = parameters(), parameters(), parameters()
    run(torch.optim.Muon(expected, **settings), expected, 20)
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
    assert different == {"ns_coefficients", "adjust_lr_fn"}  # "jordan" names torch's triple; KERNELS.md sets the other
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
    monkeypatch.setattr("prx_kernels.muon_distributed.MAX_ELEMENTS", 4000)
    optimizer = Muon(parts)
    assert len(optimizer._plans[0].exchange.buckets) > 2
    run(optimizer, parts)
    assert error(parts, whole) <= 1e-5


# --- what is not finite ------------------------------------------------------------------------------------------


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


# --- state -------------------------------------------------------------------------------------------------------


def test_state_is_there_before_the_first_step():
    params = parameters([(4, 6), (5,)])
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "use_muon": False}])
    assert {k: v.abs().sum() for k, v in optimizer.state[params[0]].items()} == {"momentum_buffer": 0}
    assert {k: v.abs().sum() for k, v in optimizer.state[params[1]].items()} == {
        "step": 0,
        "exp_avg": 0,
        "exp_avg_sq": 0,
    }


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
def test_a_saved_run_goes_on_to_the_bit(momentum_dtype):
    """bfloat16 momentum too, though torch casts loaded state to the dtype of the parameter."""

    def make(params):
        groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
        return Muon(groups, momentum_dtype=momentum_dtype)

    shapes = [*SHAPES, (5,)]
    through, stopped = parameters(shapes), parameters(shapes)
    run(make(through), through, 6)
    optimizer = make(stopped)
    run(optimizer, stopped, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(stopped)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    expected = momentum_dtype or torch.float32
    assert {s["momentum_buffer"].dtype for s in resumed.state.values() if "momentum_buffer" in s} == {expected}
    run(resumed, stopped, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(through, stopped, strict=True))


def test_the_state_of_torch_optim_muon_loads():
    theirs, ours = parameters(), parameters()
    before = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, adjust_lr_fn="original")
    run(before, theirs, 3)
    after = Muon(ours, capturable=True)
    after.load_state_dict(before.state_dict())
    assert {key: after.param_groups[0][key] for key in ("momentum", "adjust_lr_fn", "use_muon")} == {
        "momentum": 0.9,
        "adjust_lr_fn": "original",
        "use_muon": True,
    }
    assert after.param_groups[0]["lr"].item() == pytest.approx(0.01)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(after.state[p]["momentum_buffer"], before.state[q]["momentum_buffer"])
        p.data.copy_(q.data)
    run(before, theirs, 2, first=3)
    run(after, ours, 2, first=3)
    assert error(ours, theirs) <= 2e-3  # bfloat16 there, at a learning rate of 1e-2


def test_a_parameter_that_torch_saved_without_state_gets_its_own():
    theirs, ours = parameters(), parameters()
    before = torch.optim.Muon(theirs)
    fill_gradients(theirs[1:], 0)
    before.step()
    after = Muon(ours)
    after.load_state_dict(before.state_dict())
    assert set(after.state[ours[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_work_on(clone):
    params = parameters()
    optimizer = Muon(params, ns_dtype=torch.float32)
    run(optimizer, params, 2)
    other = clone(optimizer)
    others = other.param_groups[0]["params"]
    run(optimizer, params, 2, first=2)
    run(other, others, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_groups_can_be_added_later():
    params = parameters([(16, 16), (8, 24), (5,)])
    optimizer = Muon(params[:1])
    optimizer.add_param_group({"params": params[1:2], "lr": 0.5})
    optimizer.add_param_group({"params": params[2:], "use_muon": False})
    run(optimizer, params, 1)
    assert all(not torch.equal(p, q) for p, q in zip(params, parameters([(16, 16), (8, 24), (5,)]), strict=True))
    assert optimizer.param_groups[2]["eps"] == 1e-8


# --- settings ----------------------------------------------------------------------------------------------------


def test_a_learning_rate_may_be_a_tensor():
    numbers, tensors = parameters([*SHAPES, (5,)]), parameters([*SHAPES, (5,)])

    def make(params, lr, **settings):
        groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
        return Muon(groups, lr=lr, **settings)

    schedules = []
    for params, optimizer in (
        (numbers, make(numbers, 0.01)),
        (tensors, make(tensors, torch.tensor(0.01, dtype=torch.float64))),
    ):
        schedules.append((params, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)))
    for step, (params, optimizer, schedule) in itertools.product(range(3), schedules):
        run(optimizer, params, 1, first=step)
        schedule.step()
    assert error(tensors, numbers) <= 1e-6
    capturable = make(parameters([*SHAPES, (5,)]), 0.01, capturable=True)
    assert all(isinstance(group["lr"], torch.Tensor) for group in capturable.param_groups)


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


def test_closures_and_missing_gradients():
    params = parameters([(4, 4), (4, 6), (5,)])
    optimizer = Muon([{"params": params[:2]}, {"params": params[2:], "use_muon": False}])
    before = [p.detach().clone() for p in params]

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == before[0].square().sum()
    assert not torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert optimizer.state[params[2]]["step"] == 0


# --- errors ------------------------------------------------------------------------------------------------------


ERRORS = {
    "parameter 1 of group 0 has shape (2, 3, 4)": lambda: Muon([*parameters([(4, 4)]), *parameters([(2, 3, 4)])]),
    "ns_coefficients must be one of jordan, polar_express or triples, got 'keller'": lambda: Muon(
        parameters(), ns_coefficients="keller"
    ),
    "ns_steps must be at least 1, got 0": lambda: Muon(parameters(), ns_steps=0),
    "lr must not be negative, got -1.0": lambda: Muon(parameters(), lr=-1.0),
    "lr must be one number, got a tensor of shape (2,)": lambda: Muon(parameters(), lr=torch.ones(2)),
    "momentum must be in [0, 1], got 1.5": lambda: Muon(parameters(), momentum=1.5),
    "weight_decay must not be negative, got nan": lambda: Muon(parameters(), weight_decay=float("nan")),
    "adjust_lr_fn must be one of None, original": lambda: Muon(parameters(), adjust_lr_fn="rms"),
    "ns_algorithm must be 'auto', 'gram' or 'standard', got 'svd'": lambda: Muon(parameters(), ns_algorithm="svd"),
    "wire_dtype must be bfloat16 or float32": lambda: Muon(parameters(), wire_dtype=torch.float16),
    "betas must be two numbers in [0, 1), got (0.9, 1.0)": lambda: Muon(
        [{"params": parameters([(3,)]), "use_muon": False, "betas": (0.9, 1.0)}]
    ),
    "split_sizes must be positive numbers of rows that add up to 6 for 'q', got (4, 4)": lambda: Muon(
        [("q", parameters([(6, 4)])[0])], split_sizes={"q": (4, 4)}
    ),
    "split_sizes names 'k', which is no parameter of a Muon group": lambda: Muon(
        [("q", parameters([(6, 4)])[0])], split_sizes={"k": (3, 3)}
    ),
}


def test_a_parameter_that_is_no_matrix_is_named():
    named = [("w", nn.Parameter(torch.ones(4, 4))), ("blocks.0.bias", nn.Parameter(torch.ones(4)))]
    message = (
        r"matrices, but 'blocks.0.bias' has shape \(4,\); put it into a group with use_muon=False, which runs AdamW"
    )
    with pytest.raises(ValueError, match=message):
        Muon(named)


@pytest.mark.parametrize("message", ERRORS)
def test_bad_arguments_are_refused_in_one_sentence(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ERRORS[message]()


def test_integers_complex_numbers_and_sparse_gradients_are_refused():
    with pytest.raises(TypeError, match="floating-point parameters, but parameter 0 of group 0 is torch.complex64"):
        Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    params = parameters([(4, 4)])
    params[0].grad = torch.eye(4).to_sparse()
    with pytest.raises(TypeError, match="dense gradients, got one of layout torch.sparse_coo"):
        Muon(params).step()


# --- owners ------------------------------------------------------------------------------------------------------


def test_owners_are_within_the_bound_of_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    for ranks in (1, 2, 3):
        for count in range(9):
            costs = (torch.rand(count, generator=generator) ** 2).tolist()
            owners = assign_owners(costs, ranks)
            assert owners == assign_owners(costs, ranks)

            def longest(to, costs=costs, ranks=ranks):
                return max(sum(c for c, o in zip(costs, to, strict=True) if o == rank) for rank in range(ranks))

            best = min(longest(to) for to in itertools.product(range(ranks), repeat=count))
            assert longest(owners) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-12


def test_owners_of_equal_work_take_turns_and_prx_at_32_ranks_holds_three_or_four():
    assert assign_owners([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert assign_owners([], 4) == []
    h = 1792
    shapes = [(3 * h, h), (2 * h, h), (h, h), (6 * h, h), (7 * h // 2, h), (7 * h // 2, h), (h, 7 * h // 2)] * 16
    costs = [muon.newton_schulz_flop(*shape, algorithm="gram", restarts=(3,)) for shape in shapes]
    owners = assign_owners(costs, 32)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(32)]
    assert {owners.count(rank) for rank in range(32)} <= {3, 4}
    assert max(loads) <= 1.1 * sum(loads) / 32
    turns = [sum(costs[rank::32]) for rank in range(32)]
    assert max(turns) >= 1.2 * max(loads), "taking turns would be no worse"


@pytest.mark.parametrize(("costs", "ranks"), [([1.0], 0), ([-1.0], 2), ([float("nan")], 2)])
def test_impossible_work_is_refused(costs, ranks):
    with pytest.raises(ValueError, match="got"):
        assign_owners(costs, ranks)


def test_rows_of_a_shard_are_those_of_dtensor():
    for height, shards in itertools.product((1, 3, 4, 10, 66), (1, 2, 4, 7)):
        chunks = list(torch.arange(height).chunk(shards))
        for shard in range(shards):
            first, last = shard_rows(height, shard, shards)
            assert list(range(first, last)) == (chunks[shard].tolist() if shard < len(chunks) else [])
        for row in range(height):
            block = Block(height, row, min(3, height - row), 5, 1.0)
            assert sum(block.elements_of(shard, shards) for shard in range(shards)) == 5 * block.rows


# --- kernels -----------------------------------------------------------------------------------------------------


def test_kernels_equal_the_definitions_in_the_interpreter(run_interpreted):
    run_interpreted("test_muon.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_equal_the_definitions_on_the_gpu(state):
    for shape in (*checks.SIZES, (1792, 5376)):
        for grad, out in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            checks.check_momentum(shape, grad, state, out, "cuda")
            checks.check_apply(shape, state, out, "cuda")
    checks.check_not_finite("cuda")
    checks.check_layouts("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_matrices_beyond_32_bits_on_the_gpu():
    rows = 2**16 + 1
    grad, buffer = (torch.full((rows, 2**15), x, dtype=torch.bfloat16, device="cuda") for x in (1.0, 0.0))
    momentum_update([grad], [buffer], [], 0.5, True)
    assert buffer[-1, -1] == buffer[0, 0] == 0.5
    apply_update([buffer], [grad], [1.0], torch.full((), 0.25, device="cuda"), 0.0)
    assert buffer[-1, -1] == buffer[0, 0] == 0.25


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_build_with_wide_accesses_and_without_spills(arch):
    pytest.importorskip("triton")
    from . import muon_builds
    from .ahead_of_time import MAX_SHARED

    for name, made in muon_builds.passes(arch):
        assert made.stack == 0, name
        assert made.shared <= MAX_SHARED, name
        scalar = [4] if name.startswith("apply") else []  # the learning rate
        assert sorted(made.accesses("ld")) == scalar + [16] * (len(made.accesses("ld")) - len(scalar)), name
        assert set(made.accesses("st")) == {16}, name


def op_arguments():
    g, b, u, p = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4))
    yield momentum_update, ([g, g[:0]], [b, b[:0]], [u, u[:0]], 0.95, True)
    yield momentum_update, ([g], [b], [], 0.95, True)
    yield apply_update, ([p], [u], [0.2], torch.tensor(0.1), 0.1)


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
