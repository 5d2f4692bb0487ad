"""Routed models in threads, after exceptions, with numbers that do not fit, lazy tensors; what the checks cost."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from prx_kernels import gather_tokens, route_blocks, scatter_tokens

from .models import Model, Rope, inputs, rotary_tables
from .test_blocks import expected

PER_BLOCK = partial(checkpoint, use_reentrant=False)


# Both at once fail loudly in torch: in a repetition Dynamo may take another of the graphs that fit (pytorch 166926).
@pytest.mark.parametrize(("checkpointed", "compiled"), [(False, False), (True, False), (False, True)])
def test_two_threads_may_use_one_routed_model(checkpointed, compiled):
    """Each forward is that of its own tokens, and its gradient too. With one state for all, 30 of 600 were not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(checkpoint=PER_BLOCK if checkpointed else None).double()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        x, c = (t.double() for t in inputs())  # compiled by one thread: two at once would make each graph twice
        model(x.requires_grad_(), c).sum().backward()
    wrong, finished, started, rounds = [], [], threading.Barrier(2), 60

    def work(which: int) -> None:
        started.wait()
        for step in range(rounds):
            x, c = (t.double() for t in inputs(seed=2 * step + which))
            x.requires_grad_()
            out = model(x, c)
            keep = route.keep
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            y = x.detach().requires_grad_()
            reference = expected(model, y, c, keep)
            (wanted,) = torch.autograd.grad(reference.square().sum(), y)
            if not (torch.allclose(out, reference) and torch.allclose(grad, wanted)):
                wrong.append((which, step))
        finished.append(which)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert sorted(finished) == [0, 1]


@pytest.mark.parametrize("rope", [Rope(12), rotary_tables(12)])
def test_two_threads_may_use_one_table(rope):
    """A module's tables were swapped in place: what one thread put back was another's."""
    torch.manual_seed(0)
    model, (x, c) = Model(rope=rope), inputs()
    route = route_blocks(model.blocks, 1, 2, 0.5, per_token={"feat_rope": 0}, shared=True)
    sets = [torch.randperm(12)[:6].sort().values.int().expand(2, 6) for _ in range(8)]
    wrong, interval = [], sys.getswitchinterval()
    before = [t.clone() for t in (rope.buffers() if isinstance(rope, nn.Module) else rope)]
    single = Model(rope=rope)
    single.load_state_dict(model.state_dict(), strict=False)
    alone = route_blocks(single.blocks, 1, 2, 0.5, per_token={"feat_rope": 0}, shared=True)
    wanted = {}
    for fixed in sets:
        alone.fixed = fixed
        wanted[tuple(fixed[0].tolist())] = single(x, c).detach()

    def work() -> None:
        for _ in range(60):
            out = model(x, c)
            keep = tuple(route.keep[0].tolist())
            if keep in wanted and not torch.equal(out, wanted[keep]):
                wrong.append(keep)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for fixed in sets * 8:
            route.fixed = fixed
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    for old, new in zip(before, rope.buffers() if isinstance(rope, nn.Module) else rope, strict=True):
        assert torch.equal(old, new)


class Node(torch.autograd.Function):
    """A step of a graph that says whether it is alive."""

    alive: weakref.ref | None = None

    @staticmethod
    def forward(ctx, x):
        ctx.mark = type("Mark", (), {})()
        Node.alive = weakref.ref(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("failing", [1, 2])
def test_after_an_exception_inside_of_a_block_no_graph_stays_alive(failing):
    model = Model(depth=4)
    route_blocks(model.blocks, 1, 2, 0.5)
    hook = model.blocks[failing].norm2.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    x, c = inputs()
    x.requires_grad_()

    def run():
        y = Node.apply(x)
        for block in model.blocks:
            y = block(y, c)

    with pytest.raises(KeyError, match="stop"):
        run()
    gc.collect()
    assert Node.alive() is None
    hook.remove()
    model(x, c).sum().backward()


def test_a_set_beyond_32_bits_is_refused():
    route = route_blocks(Model().blocks, 1, 2, 0.5)
    for number in (2**32 + 1, 2**31, -1):
        with pytest.raises(ValueError, match=f"0 to 2.31 - 1, got {number}"):
            route.fixed = torch.tensor([[0, number], [0, 1]])


def test_a_number_that_is_no_token_is_an_error_where_it_could_not_be_looked_at():
    """As on a GPU, where looking would mean waiting: it does not become another token's."""
    model = Model()
    route = route_blocks(model.blocks, 1, 2, 0.5)
    route._fixed = torch.tensor([[0, 2**32 + 1], [0, 1]])
    with pytest.raises(IndexError, match="index 2147483647, outside the 12 tokens"):
        model(*inputs())


def test_lazy_conjugate_and_negative_tensors_are_gathered_and_scattered():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, dtype=torch.complex64, requires_grad=True)
    keep = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32)
    index = keep.long()[..., None].expand(-1, -1, 3)
    for lazy in (x.conj(), x.conj().imag, x.conj()[..., 1:].imag, x.real, x.conj().mT.conj().mT):
        plain = lazy.clone()
        wanted = plain.gather(1, index[..., : plain.shape[-1]])
        assert torch.equal(gather_tokens(lazy, keep), wanted)
        put = scatter_tokens(lazy, 2 * gather_tokens(lazy, keep), keep)
        assert torch.equal(put, plain.scatter(1, index[..., : plain.shape[-1]], 2 * wanted))
    (grad,) = torch.autograd.grad(gather_tokens(x.conj(), keep).abs().square().sum(), x)
    (wanted,) = torch.autograd.grad(x.conj().gather(1, index).abs().square().sum(), x)
    assert torch.equal(grad, wanted)


# --- cost --------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


def test_after_the_first_forward_the_checks_cost_nothing():
    """Nothing of suspects.py or verify.py is called; no op more is run than the route itself has."""
    model, (x, c) = Model(depth=5, rope=rotary_tables(12)), inputs()
    route_blocks(model.blocks, 1, 3, 0.5, per_token={"feat_rope": 0}, shared=True)
    called, ops = [], []

    def profile(frame, event, _):
        if event == "call" and "prx_kernels" in frame.f_code.co_filename:
            called[-1].append((frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))

    for _ in range(3):
        called.append([])
        with torch.no_grad(), Counting() as counting:
            sys.setprofile(profile)
            try:
                model(x, c)
            finally:
                sys.setprofile(None)
        ops.append(counting.ops)
    files = [{file for file, _ in calls} for calls in called]
    assert "suspects.py" in files[0]
    assert "suspects.py" not in files[1] | files[2]
    assert "verify.py" not in files[0] | files[1]
    assert ops[1] == ops[2] <= ops[0]
    assert called[1] == called[2]
    # around.py: one call a block, one to see that there is nothing to look at.
    around = [name for file, name in called[1] if file == "around.py" and not name.startswith("<")]
    assert around == ["around", "_prepare"] * 3
