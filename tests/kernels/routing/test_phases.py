"""When a route is on, for how many tokens, and which: phases, ratios, forced tokens, importance."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prx_kernels import route_blocks

from .models import HIDDEN, Model, inputs, permutations
from .test_blocks import expected, gradients

PER_BLOCK = partial(checkpoint, use_reentrant=False)


def magnitude(x):
    return x.abs().sum(-1)


def test_a_schedule_by_step_and_negative_indices():
    """The README's three lines: routed for the first 90 % of training, ever fewer tokens bypassing."""
    torch.manual_seed(0)
    model, (x, c), steps = Model(depth=4), inputs(), 10
    dense = model(x, c)
    route = route_blocks(model.blocks, 1, -2, 0.5)
    assert (route.start, route.end) == (1, 2)
    kept = []
    for step in range(steps):
        route.enabled = step < 0.9 * steps
        route.selection_ratio = 0.5 * (1 - step / steps)
        out = model(x, c)
        kept.append(route.keep.shape[1])
        assert torch.equal(out, dense) == (step == 9)
    assert kept[:9] == [6, 7, 7, 8, 8, 9, 10, 10, 11]
    with pytest.raises(ValueError, match="start -5 and end 1 must lie in the 4 blocks"):
        route_blocks(Model().blocks, -5, 1, 0.5)


def test_a_ratio_of_zero_is_dense():
    torch.manual_seed(0)
    model, (x, c) = Model(), inputs()
    dense = model(x, c)
    route = route_blocks(model.blocks, 1, 2, 0.0)
    assert torch.equal(model(x, c), dense)
    assert route.keep is None
    route.selection_ratio = 0.25
    assert not torch.equal(model(x, c), dense)
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"lies in \(0, 1\), got {value}"):
            route.selection_ratio = value


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_share_of_forwards_is_routed_and_each_backward_is_that_of_its_forward(reentrant, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(checkpoint=None if reentrant is None else partial(checkpoint, use_reentrant=reentrant))
    plain = copy.deepcopy(model)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    route.manual_seed(1)
    route.probability = 0.5
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    routed = []
    for step in range(12):
        x, c = inputs(seed=step)
        x.requires_grad_()
        before = route.keep
        out = model(x, c)
        routed.append(route.keep is not before)
        out.square().sum().backward()
        actual = gradients(model)
        reference = expected(plain, x, c, route.keep) if routed[-1] else plain(x, c)
        reference.square().sum().backward()
        for name, grad in gradients(plain).items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    assert 2 <= sum(routed) <= 10

    def phases(seed):
        route.manual_seed(seed)
        return [route.next_phase(0.5) for _ in range(64)]

    assert phases(3) == phases(3) != phases(4)
    assert 20 <= sum(phases(3)) <= 44


def test_a_probability_is_refused_where_one_graph_holds_the_whole_model():
    torch._dynamo.reset()
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    route.probability = 0.5
    with pytest.raises(Exception, match=r"compile the blocks in place \(block.compile\(\)\), or set route.enabled"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs())
    with pytest.raises(ValueError, match="0 to 1, got 1.5"):
        route.probability = 1.5


@pytest.mark.parametrize("compiled", [False, True])
def test_forced_tokens_go_through_and_the_others_are_drawn(compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(checkpoint=PER_BLOCK)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([3, 5])  # padded text ahead: a prefix of each sample's own length
    force = torch.arange(12) < lengths[:, None]
    drawn = set()
    for step in range(8):
        x, c = inputs(seed=step)
        route.force_keep = force
        model(x, c).square().sum().backward()
        keep = route.keep
        assert keep.shape == (2, 6)
        assert (keep.diff(dim=1) > 0).all()
        assert all(set(range(n)) <= set(row.tolist()) for n, row in zip(lengths, keep, strict=True))
        drawn.add(tuple(keep[0, 3:].tolist()))
        actual = gradients(model)
        expected(model, x, c, keep).square().sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    assert len(drawn) > 4


def test_what_cannot_be_forced_is_refused():
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    route.force_keep = torch.arange(12).expand(2, 12) < 7
    with pytest.raises(ValueError, match="7 tokens of a sample must go through, but the route keeps 6"):
        model(*inputs())
    route.force_keep = torch.ones(2, 11, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must be bool of shape \(batch, tokens\) = \(2, 12\)"):
        model(*inputs())
    route.force_keep, route.fixed = torch.zeros(2, 12, dtype=torch.bool), permutations(2, 12)
    with pytest.raises(ValueError, match="set route.force_keep to None beside it"):
        model(*inputs())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_most_important_tokens_are_kept_and_recomputed_alike(compiled, shared):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(checkpoint=PER_BLOCK)
    route = route_blocks(model.blocks, 1, 2, 0.5, score=magnitude, shared=shared)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    for step in range(3):
        x, c = inputs(seed=step)
        seen = []
        hook = model.blocks[0].register_forward_hook(lambda *a, seen=seen: seen.append(a[2].detach()))
        model(x, c).square().sum().backward()
        hook.remove()
        score = magnitude(seen[0]).double()
        score = score.mean(0, keepdim=True).expand(2, -1) if shared else score
        assert torch.equal(route.keep.long(), score.topk(6, dim=1).indices.sort(dim=1).values)
        actual = gradients(model)
        expected(model, x, c, route.keep).square().sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_forced_tokens_come_before_important_ones():
    torch.manual_seed(0)
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5, score=lambda x: -torch.arange(12.0).expand(2, 12))
    route.force_keep = torch.arange(12).expand(2, 12) == 11
    model(*inputs())
    assert route.keep.tolist() == [[0, 1, 2, 3, 4, 11]] * 2
    route.score = lambda x: x
    with pytest.raises(ValueError, match=rf"score must give .* \(2, 12\), got \(2, 12, {HIDDEN}\)"):
        model(*inputs())
