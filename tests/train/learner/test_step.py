"""One training step: nothing in it waits for the device, skipped steps change nothing, its parts add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.ranks import training as ranks
from train.data.loader import Batch, batches, open_dataset
from train.learner.step import T_BINS, Learner, micro_batches
from train.ranks import parallel
from train.recipes import Parallel
from train.run.meter import Meter

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}
"""What a CUDA device would have to be waited for: their results decide values or shapes on the host."""


class Waits(TorchDispatchMode):
    """Lists the operations of `WAITS` that run inside; the kernels of custom ops are one operation each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def learner() -> Learner:
    asked = ranks.recipe(Parallel(micro_batches=2))
    with pytest.warns(UserWarning, match="RANDOM"):
        return Learner(asked, parallel.start(asked.train))


@pytest.fixture
def source(learner: Learner) -> Iterator[Batch]:
    return batches(open_dataset(learner.recipe.data, 0, 8), learner.recipe, learner.world, 0)


def test_the_mode_sees_what_waits() -> None:
    with Waits() as waits:
        torch.ones(()).item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert [name.split(".")[0] for name in waits.seen] == ["aten::_local_scalar_dense", "aten::nonzero"][
        : len(waits.seen)
    ]
    assert waits.seen


def test_a_step_reads_nothing_back_from_the_device(learner: Learner, source: Iterator[Batch]) -> None:
    batch = next(source)
    learner.step(batch, 0)  # first calls may look at shapes
    meter = Meter(learner.recipe, learner.world, learner.parameters, {})
    with Waits() as waits:
        meter.add(learner.step(next(source), 1), 0.0)
    assert waits.seen == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight_state_or_average(
    learner: Learner, source: Iterator[Batch], value: float
) -> None:
    before = ranks.tensors_of(learner)
    weight = learner.modules.model.final_layer.linear.weight
    hook = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))
    skipped = learner.skipped.tolist()
    learner.step(next(source), 2)
    hook.remove()
    after = ranks.tensors_of(learner)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert learner.skipped.tolist() == [skipped[0] + 1, skipped[1] + 1]
    learner.step(next(source), 2)
    assert learner.skipped.tolist() == [skipped[0] + 1, 0]
    assert not torch.equal(ranks.tensors_of(learner)["model/final_layer.linear.weight"], weight.new_zeros(weight.shape))


def test_losses_by_t_add_up_to_the_loss(learner: Learner, source: Iterator[Batch]) -> None:
    result = learner.step(next(source), 4)
    assert result.bins.shape == (2, T_BINS)
    assert result.bins[1].sum() == learner.recipe.train.batch
    torch.testing.assert_close(result.bins[0].sum() / result.bins[1].sum(), result.parts["loss/flow"])
    torch.testing.assert_close(result.losses.mean(), result.parts["loss/flow"])


def test_micro_batches_are_the_batch_in_order(source: Iterator[Batch]) -> None:
    batch = next(source)
    parts = list(micro_batches(batch, 4))
    assert [len(part.captions) for part in parts] == [2, 2, 2, 2]
    assert torch.equal(torch.cat([part.positions for part in parts]), batch.positions)
    assert torch.equal(torch.cat([part.image for part in parts]), batch.image)
    assert [caption for part in parts for caption in part.captions] == batch.captions
