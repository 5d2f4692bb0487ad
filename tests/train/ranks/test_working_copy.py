"""One process in bfloat16 trains on a working copy of its weights what FSDP2 over one rank trained."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tests.train.ranks import training as ranks
from train.ranks import parallel
from train.ranks.parallel import World
from train.ranks.working_copy import WorkingCopy, copies_of
from train.recipes import Parallel

WAYS = {
    "plain": Parallel(),
    "accumulation and checkpointing": Parallel(micro_batches=2, checkpointing=True),
}


def both(settings: Parallel, *, muon: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ten steps with a working copy, and sharded over one rank."""
    copied = ranks.train(settings, precision="bf16", muon=muon)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        sharded = ranks.train(settings, World(0, 1, torch.device("cpu"), mesh), precision="bf16", muon=muon)
    finally:
        parallel.finish()
    return copied, sharded


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_ten_steps_are_those_of_one_sharded_rank(settings: Parallel) -> None:
    copied, sharded = both(settings, muon=False)
    assert copied.keys() == sharded.keys()
    torch.testing.assert_close(copied["losses"][:, 0], sharded["losses"][:, 0], rtol=1e-6, atol=1e-6)
    for name in copied:
        assert copied[name].dtype == sharded[name].dtype, name
        # The norm of the gradients is summed over tensors of another layout: a last bit of every update.
        torch.testing.assert_close(copied[name], sharded[name], rtol=1e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(copied["initial/model/final_layer.linear.weight"], copied["model/final_layer.linear.weight"])


def test_ten_steps_of_muon_differ_by_the_order_of_its_sums_alone() -> None:
    """Sharded matrices are orthogonalised in other batches: the same sums in float32, in another order."""
    copied, sharded = both(Parallel(), muon=True)
    torch.testing.assert_close(copied["losses"][:5], sharded["losses"][:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(copied["losses"], sharded["losses"], rtol=1e-4, atol=1e-5)


def layer() -> tuple[nn.Linear, WorkingCopy]:
    torch.manual_seed(0)
    made = nn.Linear(8, 8, bias=False)
    return made, WorkingCopy(made, torch.bfloat16)


def test_a_weight_that_anybody_changes_is_computed_with_at_the_next_forward() -> None:
    module, copy = layer()
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    weight = module.weight
    before = module(x)
    copy.put_back()
    assert module.weight is weight
    with torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(module(x), 2 * before)
    held = module.weight
    module(x)
    assert module.weight is held, "the same copy stays, so that compiled code finds what it was compiled for"


def test_the_copy_is_not_renewed_where_it_was_written() -> None:
    module, copy = layer()
    module(torch.zeros(1, 8, dtype=torch.bfloat16))
    copy.put_back()
    ((weight, working),) = copy.pairs()
    with torch.no_grad():
        weight.add_(1)
        working.fill_(7)
    copy.written()
    out = module(torch.ones(1, 8, dtype=torch.bfloat16))
    assert (out == 56).all()


def test_gradients_come_as_they_are_from_one_backward_and_are_summed_in_float32_from_two() -> None:
    module, copy = layer()
    x, y = torch.randn(2, 64, 8, dtype=torch.bfloat16)
    weight = module.weight

    def gradient(given: Tensor) -> Tensor:
        module(given).square().sum().backward()
        copy.put_back()
        found = weight.grad
        assert found is not None
        return found

    first = gradient(x)
    assert first.dtype == torch.bfloat16
    weight.grad = None
    second = gradient(y)
    weight.grad = None
    gradient(x)
    both = gradient(y)
    assert both.dtype == torch.float32
    assert torch.equal(both, first.float() + second.float())


def test_names_and_state_are_those_of_the_float32_weights() -> None:
    module, copy = layer()
    names = list(dict(module.named_parameters()))
    module(torch.zeros(1, 8, dtype=torch.bfloat16))
    copy.put_back()
    assert list(dict(module.named_parameters())) == names
    assert module.state_dict()["weight"].dtype == torch.float32
    assert copies_of([nn.Sequential(module)]) == [copy]
