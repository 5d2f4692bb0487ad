"""Muon's state, settings and errors, and who owns which matrix."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import nn

from prx_kernels import Muon, assign_owners
from prx_kernels.muon.exchange import Exchange
from prx_kernels.muon.owners import Block, Layout, shard_rows
from prx_kernels.newton_schulz.polynomials import newton_schulz_flop

from .training import SHAPES, error, fill_gradients, parameters, run

# --- AdamW's memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_adamw_updates_what_lies_otherwise_in_memory_as_torch_does(late):
    """Weights, gradients and state in different orders: torch's fused kernel alone would mix up their entries."""
    storage = torch.arange(48.0).reshape(6, 8)
    layouts = [
        lambda: torch.arange(24.0).reshape(4, 6).T,
        lambda: storage.clone()[:, ::2],
        lambda: torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
        lambda: torch.arange(6.0).reshape(1, 6),
    ]
    ours, theirs = ([nn.Parameter(make() / 10) for make in layouts] for _ in range(2))
    optimizer = Muon([{"params": ours, "use_muon": False}], lr=0.1)
    expected = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1, foreach=False)
    for step in range(4):
        if late and step == 2:  # as model.to(memory_format=...) does behind the optimizer's back
            for p in (*ours, *theirs):
                p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            torch.manual_seed(10 * step + i)
            grad = torch.randn(p.shape)
            p.grad, q.grad = grad if step else grad[:1].expand(p.shape), (grad if step else grad[:1].expand(p.shape))
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_is_there_before_the_first_step():
    params = parameters([(4, 6), (5,)])
    optimizer = Muon([{"params": params[:1]}, {"params": params[1:], "use_muon": False}])
    assert {k: v.abs().sum() for k, v in optimizer.state[params[0]].items()} == {"momentum_buffer": 0}
    assert {k: v.abs().sum() for k, v in optimizer.state[params[1]].items()} == {
        "step": 0,
        "exp_avg": 0,
        "exp_avg_sq": 0,
    }


@pytest.mark.parametrize(
    ("dtype", "momentum_dtype"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)]
)
def test_a_saved_run_goes_on_to_the_bit(dtype, momentum_dtype):
    """Momentum of another dtype too, though torch casts loaded state to the dtype of the parameter."""

    def make(params):
        groups = [{"params": params[:-1]}, {"params": params[-1:], "use_muon": False}]
        return Muon(groups, momentum_dtype=momentum_dtype)

    shapes = [*SHAPES, (5,)]
    through, stopped = parameters(shapes, dtype), parameters(shapes, dtype)
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


def one_group(*params, **settings) -> Muon:
    return Muon([{"params": list(params), **settings}])


def misfits():
    """Name -> what it is loaded into, the state, and what is said."""
    small, large = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4_000_000))
    p, q = parameters([(4, 6), (4, 6)])
    adam = torch.optim.AdamW(parameters([(4, 6), (4, 6)]))
    run(adam, adam.param_groups[0]["params"], 1)
    return {
        "smaller": (
            one_group(large, use_muon=False), one_group(small, use_muon=False).state_dict(),
            "parameter 0 of group 0 has shape (4000000,), and exp_avg in the state has (3,)",
        ),
        "another matrix": (
            Muon([("w", p)]), Muon([("w", parameters([(6, 4)])[0])]).state_dict(),
            "'w' has shape (4, 6), and momentum_buffer in the state has (6, 4)",
        ),
        "another order": (
            Muon([("p", p), ("q", q)]), Muon([("q", q), ("p", p)]).state_dict(),
            "the state has 'q' where parameter 0 of group 0 is 'p'",
        ),
        "AdamW's": (Muon([("p", p), ("q", q)]), adam.state_dict(), "'p' has a state of AdamW (exp_avg, exp_avg_sq)"),
        "of another algorithm": (
            one_group(p), one_group(q, use_muon=False).state_dict(), "group 0 runs Muon, and the state was saved",
        ),
        "fewer": (one_group(p, q), one_group(p).state_dict(), "group 0 of the state has 1 parameters, and here it has"),
    }  # fmt: skip


@pytest.mark.parametrize("name", misfits())
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(name):
    optimizer, state, message = misfits()[name]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(state)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


# --- settings ---------------------------------------------------------------------------------------------------------


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


# --- errors -----------------------------------------------------------------------------------------------------------


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
    "a group must hold each parameter once, and parameter 0 is parameter 2 as well": lambda: Muon(
        [*(some := parameters([(4, 4), (4, 4)])), some[0]]
    ),
    "fused must be True or left out, got False": lambda: Muon(parameters(), fused=False),
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


# --- owners -----------------------------------------------------------------------------------------------------------


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
    costs = [newton_schulz_flop(*shape, algorithm="gram", restarts=(3,)) for shape in shapes]
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


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    weight, bias = parameters([(4, 6), (5,)])
    optimizer = Muon([weight])
    with pytest.raises(ValueError, match="orthogonalises matrices"):
        optimizer.add_param_group({"params": [bias]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bias], "use_muon": False})
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, [weight, bias], 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"momentum_dtype": torch.int32}, "momentum_dtype must be floating, got torch.int32"),
        ({"ns_dtype": torch.int8}, "ns_dtype must be float16, bfloat16, float32 or float64, got torch.int8"),
    ],
)
def test_dtypes_that_cannot_hold_updates_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Muon(parameters([(4, 6)]), **settings)


def test_torchs_settings_that_we_lack_are_refused():
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        Muon([{"params": parameters([(5,)]), "use_muon": False, "amsgrad": True}])


def test_a_group_without_parameters_is_one():
    assert len(Muon([{"params": []}]).param_groups) == 1


def test_torch_optim_muon_loads_our_state():
    ours, theirs = parameters(), parameters()
    before = Muon(ours, lr=1e-3)
    run(before, ours, 3)
    after = torch.optim.Muon(theirs, lr=1e-3)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data)
    state = before.state_dict()
    after.load_state_dict(state)
    run(before, ours, 2, first=3)
    run(after, theirs, 2, first=3)
    assert error(ours, theirs) <= 2e-3


def test_a_compiled_training_step_goes_round_the_optimizer():
    torch._dynamo.reset()
    compiled, plain = parameters([(4, 6), (5,)]), parameters([(4, 6), (5,)])
    make = [Muon([{"params": x[:1]}, {"params": x[1:], "use_muon": False}]) for x in (compiled, plain)]
    for optimizer, x in zip(make, (compiled, plain), strict=True):
        fill_gradients(x, 0)
        (torch.compile(optimizer.step, backend="aot_eager") if x is compiled else optimizer.step)()
    assert all(torch.equal(p, q) for p, q in zip(compiled, plain, strict=True))


@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (4, 8), (16, 8)])
def test_replicas_send_one_another_no_more_than_the_updates(replicas: int, shards: int) -> None:
    """What pads an all-gather is sent for nothing: alike matrices have to be spread over the replicas."""
    shapes = [(768, 256), (512, 256), (256, 256), (1536, 256), (896, 256), (896, 256), (256, 896)] * 16
    blocks = [Block(rows, 0, rows, columns, float(rows * columns)) for rows, columns in shapes]
    for shard in (0, shards - 1):
        layout = Layout(shards=shards, shard=shard, replicas=replicas)
        exchange = Exchange(blocks, layout, torch.bfloat16, torch.device("meta"))
        sent = sum(bucket.width for bucket in exchange.buckets) * replicas
        needed = sum(block.elements_of(shard, shards) for block in blocks)
        assert needed <= sent <= 1.05 * needed
        assert len(set(exchange.owners)) == min(replicas * shards, len(blocks))
