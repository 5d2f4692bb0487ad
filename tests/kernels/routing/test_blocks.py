"""`route_blocks` on models that know nothing of routing: same results, right gradients, or an error."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from prx_kernels import enter_route, exit_route, route_blocks

from ..conftest import ROOT
from .models import HIDDEN, Block, Model, Rope, TupleBlock, inputs, permutations, rotary_tables

PER_BLOCK = partial(checkpoint, use_reentrant=False)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def expected(model: Model, x, c, keep, start: int = 1, end: int = 2, prefix: int = 0):
    """The definition: enter, the original blocks on the kept tokens, exit."""
    x = model.embed(x)
    if prefix:
        x = torch.cat((model.context.expand(x.shape[0], -1, -1), x), dim=1)
        keep = torch.cat((torch.arange(prefix).expand(x.shape[0], -1), keep + prefix), dim=1)
    for index, block in enumerate(model.blocks):
        forward = partial(Block.forward, block)
        if index == start:
            x, byp = enter_route(x, keep)
        x = forward(x, c)
        if index == end:
            x = exit_route(x, byp, keep)
    return x


def test_names_of_parameters_and_modules_and_the_class_name_are_unchanged():
    model, plain = Model(), Model()
    route_blocks(model.blocks, 1, 2, 0.5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in model.named_buffers()] == []
    assert str(model) == str(plain)
    assert isinstance(model.blocks[1], Block)


@pytest.mark.parametrize("prefix", [0, 3])
def test_output_and_gradients_equal_enter_blocks_exit(prefix):
    torch.manual_seed(0)
    model = Model(prefix=prefix)
    route = route_blocks(model.blocks, 1, 2, 0.5, prefix=prefix)
    x, c = inputs()
    out = model(x, c)
    out.square().sum().backward()
    actual = gradients(model)
    assert route.keep.shape == (2, 6)
    reference = expected(model, x, c, route.keep, prefix=prefix)
    reference.square().sum().backward()
    torch.testing.assert_close(out, reference, rtol=0, atol=0)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize(
    ("rope", "arguments"),
    [
        (None, {}),
        (None, {"prefix": 3}),
        (Rope(12), {"per_token": {2: 0}, "shared": True}),
        (Rope(12, ahead=3), {"per_token": {"feat_rope": 0}, "prefix": 3, "shared": True}),
        (rotary_tables(12), {"per_token": {"feat_rope": 0}, "shared": True}),
        (tuple(t[None, None] for t in rotary_tables(12)), {"per_token": {2: 2}}),
        (tuple(t[None, None].repeat(2, 1, 1, 1) for t in rotary_tables(12)), {"per_token": {"feat_rope": -2}}),
    ],
)
def test_all_tokens_in_random_order_equal_the_dense_model(rope, arguments):
    torch.manual_seed(0)
    model = Model(rope=rope, prefix=arguments.get("prefix", 0))
    x, c = inputs()
    dense = model(x, c)
    route = route_blocks(model.blocks, 1, 2, 0.5, **arguments)
    order = permutations(1 if arguments.get("shared") else 2, 12)
    route.fixed = order.expand(2, 12)
    torch.testing.assert_close(model(x, c), dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(route.keep, route.fixed)


def test_keyword_tokens_and_tuple_outputs():
    torch.manual_seed(0)
    block, c = TupleBlock(), inputs()[1]
    x = inputs()[0]
    text = torch.zeros(2, 5, HIDDEN)
    _, dense = block(text=text, hidden=x, c=c)
    route = route_blocks([block], 0, 0, 0.5, tokens="hidden", out=1)
    route.fixed = permutations(2, 12)
    out_text, out = block(text=text, hidden=x, c=c)
    torch.testing.assert_close(out, dense)
    assert torch.equal(out_text, text + 1)
    route.fixed = None
    _, out = block(text=text, hidden=x, c=c)
    bypassed = torch.ones(2, 12, dtype=torch.bool).scatter(1, route.keep.long(), False)
    assert torch.equal(out[bypassed], x[bypassed])


# --- activation checkpointing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_recomputes_with_the_same_tokens(compiled):
    torch.manual_seed(0)
    model = Model(checkpoint=PER_BLOCK)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for step in range(3):
        x, c = inputs(seed=step)
        out = model(x, c)
        out.square().sum().backward()
        actual = gradients(model)
        expected(model, x, c, route.keep).square().sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_forwards_before_one_backward_raise_under_checkpointing(compiled):
    torch._dynamo.reset()
    model = Model(checkpoint=PER_BLOCK)
    route_blocks(model.blocks, 1, 2, 0.5)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    first = model(*inputs(seed=0))
    second = model(*inputs(seed=1))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="another routed forward ran since"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="another routed forward ran since"):
        (model(*inputs(seed=0)).sum() + model(*inputs(seed=1)).sum()).backward()


def test_two_forwards_of_one_input_raise_where_only_the_first_block_is_checkpointed():
    """Its input is the same tensor in both forwards, so nothing tells them apart."""
    model = Model()
    model.embed = nn.Identity()
    route_blocks(model.blocks, 0, 2, 0.5)
    model.checkpoint = lambda block, *args: PER_BLOCK(block, *args) if block is model.blocks[0] else block(*args)
    x, c = inputs()
    first, second = model(x, c), model(x, c)
    with pytest.raises(RuntimeError, match="another routed forward ran since"):
        first.sum().backward()
    del first, second
    for _ in range(3):  # one after the other is known
        model(x, c).sum().backward()


def test_two_forwards_before_one_backward_are_right_without_checkpointing():
    torch.manual_seed(0)
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    batches, keeps, outs = [inputs(seed=s) for s in (0, 1)], [], []
    for x, c in batches:
        outs.append(model(x, c))
        keeps.append(route.keep)
    sum(out.square().sum() for out in outs).backward()
    actual = gradients(model)
    sum(expected(model, x, c, k).square().sum() for (x, c), k in zip(batches, keeps, strict=True)).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


def test_dense_evaluation_between_forward_and_backward_does_not_disturb_recomputation():
    torch.manual_seed(0)
    model = Model(checkpoint=PER_BLOCK)
    route = route_blocks(model.blocks, 1, 2, 0.5)
    x, c = inputs()
    out, keep = model(x, c), route.keep
    with torch.no_grad():
        model.eval()(*inputs(seed=5))
    model.train()
    out.square().sum().backward()
    actual = gradients(model)
    expected(model, x, c, keep).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize("spans", [(1, 4), (2, 4), (1, 3)])
def test_one_checkpoint_over_several_blocks_is_right_from_the_first_routed_block_on(spans):
    torch.manual_seed(0)
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)

    def run(x, c):
        x = model.blocks[0](model.embed(x), c)
        group = model.blocks[spans[0] : spans[1]]
        for block in model.blocks[1 : spans[0]]:
            x = block(x, c)
        x = PER_BLOCK(lambda x, c: [x := block(x, c) for block in group][-1], x, c)
        for block in model.blocks[spans[1] :]:
            x = block(x, c)
        return x

    x, c = inputs()
    run(x, c).square().sum().backward()
    actual = gradients(model)
    expected(model, x, c, route.keep).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


def test_a_checkpoint_that_begins_before_the_route_raises():
    model = Model()
    route_blocks(model.blocks, 1, 2, 0.5)
    out = PER_BLOCK(model, *inputs())
    with pytest.raises(RuntimeError, match="spans blocks from before the route"):
        out.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", [{0, 1, 2, 3}, {1, 2}, {1}, {2}])
def test_reentrant_checkpointing_of_single_blocks_gives_the_right_gradients(which, compiled):
    """LightningDiT's checkpoints are. The gradient of the bypassed tokens goes from the last block to the first."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(depth=5)
    route = route_blocks(model.blocks, 1, 3, 0.5)
    chosen = [model.blocks[i] for i in which]
    reentrant = partial(checkpoint, use_reentrant=True)
    model.checkpoint = lambda block, *args: reentrant(block, *args) if block in chosen else block(*args)
    for block in model.blocks if compiled else ():
        block.compile(fullgraph=True, backend="aot_eager")
    for step in range(2):
        x, c = inputs(seed=step)
        x.requires_grad_()
        model(x, c).square().sum().backward()
        actual, moved = gradients(model), x.grad
        x.grad = None
        expected(model, x, c, route.keep, end=3).square().sum().backward()
        torch.testing.assert_close(moved, x.grad, rtol=1e-4, atol=1e-5)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_reentrant_checkpoint_of_the_last_block_alone_says_what_to_change():
    """Nothing would lead its gradient to the bypassed tokens."""
    model = Model()
    route_blocks(model.blocks, 1, 2, 0.5)
    reentrant = partial(checkpoint, use_reentrant=True)
    model.checkpoint = lambda block, *args: reentrant(block, *args) if block is model.blocks[2] else block(*args)
    with pytest.raises(RuntimeError, match="checkpoint that one as well, or pass use_reentrant=False where the model"):
        model(*inputs())


def test_two_forwards_of_one_input_raise_under_reentrant_checkpointing():
    model = Model(checkpoint=partial(checkpoint, use_reentrant=True))
    model.embed = nn.Identity()
    route_blocks(model.blocks, 0, 2, 0.5)
    x, c = inputs()
    x.requires_grad_()
    first, second = model(x, c), model(x, c)
    with pytest.raises(RuntimeError, match="another routed forward ran since"):
        first.sum().backward()
    del first, second
    for _ in range(3):  # one after the other is known
        model(x, c).sum().backward()


def test_a_reentrant_checkpoint_of_a_block_compiled_as_another_object_is_refused():
    model = Model(checkpoint=partial(checkpoint, use_reentrant=True))
    route_blocks(model.blocks, 1, 2, 0.5)
    for i in range(4):
        model.blocks[i] = torch.compile(model.blocks[i], fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"pass use_reentrant=False where the model|compile with block.compile"):
        model(*inputs()).sum().backward()


# --- compilation, copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_compiles_fullgraph_once_for_all_steps_and_all_middle_blocks(whole):
    torch._dynamo.reset()
    torch.manual_seed(0)
    rope = tuple(t[None, None] for t in rotary_tables(12))
    model = Model(depth=3 if whole else 13, rope=rope)
    start, end = (0, 1) if whole else (1, 11)
    route = route_blocks(model.blocks, start, end, 0.5, per_token={"feat_rope": 2})
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, fullgraph=True, backend=counter) if whole else model
    for block in model.blocks if not whole else ():
        block.compile(fullgraph=True, backend=counter)
    keeps = set()
    for step in range(20):
        x, c = inputs(seed=step)
        out = run(x, c)
        out.square().mean().backward()
        actual = gradients(model)
        keeps.add(str(route.keep.tolist()))
        if step % 10 == 0:
            route.fixed = route.keep
            model(x, c).square().mean().backward() if whole else eager(model, x, c).square().mean().backward()
            route.fixed = None
            for name, grad in gradients(model).items():
                torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(keeps) == 20
    # Whole: one graph. By block: dense, first, middle and last.
    assert counter.frame_count <= (1 if whole else 4)


def eager(model, x, c):
    x = model.embed(x)
    for block in model.blocks:
        x = block.forward(x, c, model.rope)
    return x


def test_autocast_to_bfloat16_runs_and_trains():
    model = Model()
    route_blocks(model.blocks, 1, 2, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_fsdp2_on_two_ranks_with_compiled_and_checkpointed_blocks_equals_the_unsharded_model(tmp_path):
    command = [sys.executable, "-m", "tests.kernels.routing.fsdp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]


# --- errors ------------------------------------------------------------------------------------------------------


class Grid(Block):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)


@pytest.mark.parametrize(
    ("blocks", "arguments", "message"),
    [
        ([Block(), Block()], {"start": 1, "end": 0}, "starts at block 1, after it ends at block 0"),
        ([Block(), Block()], {"end": 2}, "must lie in the 2 blocks"),
        ([Block()], {"selection_ratio": 1.0}, r"lies in \(0, 1\), got 1.0"),
        ([Block()], {"tokens": "hidden"}, "no argument 'hidden'; its arguments are x, c, feat_rope"),
        ([Block()], {"tokens": 3}, "no argument 3; its arguments are x, c, feat_rope"),
        ([Block()], {"per_token": {"rope": 0}}, "no argument 'rope'; its arguments are x, c, feat_rope"),
        ([Grid()], {}, "mixes neighbours on the token grid in depthwise"),
        ([Block()] * 2, {"end": 1}, "more than once in the range"),
        ([Block()], {"prefix": -1}, "prefix is a number of tokens"),
    ],
)
def test_errors_when_routing(blocks, arguments, message):
    arguments = {"start": 0, "end": 0, "selection_ratio": 0.5, **arguments}
    with pytest.raises(ValueError, match=message):
        route_blocks(blocks, **arguments)


def test_routing_twice_is_an_error():
    model = Model()
    route_blocks(model.blocks, 1, 2, 0.5)
    with pytest.raises(ValueError, match="block 2 .Block. is routed already"):
        route_blocks(model.blocks, 2, 3, 0.5)


class Pooling(Block):
    def forward(self, x, c):
        return x[:, ::2]


def test_errors_when_run():
    x, c = inputs()
    with pytest.raises(
        ValueError, match=r"was given \(2, 6\) .batch, tokens. and must keep them, got a tensor of shape \(2, 3, 16\)"
    ):
        route_then_run([Pooling()], x, c)
    with pytest.raises(ValueError, match="pass shared=True"):
        route_then_run([Block()], x, c, rotary_tables(12), per_token={"feat_rope": 0})
    with pytest.raises(ValueError, match="has 11 entries in dimension 0 for 12 tokens"):
        route_then_run([Block()], x, c, rotary_tables(11), per_token={"feat_rope": 0}, shared=True)
    with pytest.raises(TypeError, match=r"must be a \(batch, tokens, hidden\) tensor"):
        route_then_run([Block()], x, c, tokens="c")
    with pytest.raises(TypeError, match="out=0 picks from a tuple, the block returns a tensor"):
        route_then_run([Block()], x, c, out=0)
    blocks = [Block(), Block()]
    route_blocks(blocks, 0, 1, 0.5)
    with pytest.raises(RuntimeError, match="block 1 ran without block 0"):
        blocks[1](x, c)
    longer = torch.cat((x[:, :2], blocks[0](x, c)), dim=1)
    with pytest.raises(ValueError, match="must not add or drop tokens between routed blocks"):
        blocks[1](longer, c)


def route_then_run(blocks, *args, **kwargs):
    route_blocks(blocks, 0, len(blocks) - 1, 0.5, **kwargs)
    return blocks[0](*args)
