"""The order of samples: every one once an epoch, the same on any number of ranks and after a resume."""

import pytest
import torch
from torch.utils.data import DataLoader

from train.data.sampler import PositionSampler, index_at
from train.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_each_epoch_holds_every_index_exactly_once(size: int) -> None:
    for epoch in range(6):
        order = [index_at(position, size=size, seed=3) for position in range(epoch * size, (epoch + 1) * size)]
        assert sorted(order) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [index_at(epoch * 500 + i, size=500, seed=seed) for i in range(500)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sum(a == b for a, b in zip(order(0, 0), order(0, 1), strict=True)) < 10  # 1 expected of a random pair


def test_order_does_not_depend_on_the_order_of_access_nor_on_what_is_cached() -> None:
    positions = list(range(0, 20 * 97, 13))  # 20 epochs, more than are cached
    forward = {p: index_at(p, size=97, seed=5) for p in positions}
    assert {p: index_at(p, size=97, seed=5) for p in reversed(positions)} == forward


def test_order_is_the_one_written_down_here() -> None:
    """A resume under another version of numpy or of this project must not change the order."""
    assert [index_at(p, size=10, seed=0) for p in range(12)] == [3, 4, 1, 5, 8, 0, 7, 2, 6, 9, 0, 6]


@pytest.mark.parametrize(("position", "size"), [(-1, 5), (0, 0)])
def test_negative_positions_and_empty_sets_are_refused(position: int, size: int) -> None:
    with pytest.raises(ValueError, match="position must be >= 0 and size >= 1"):
        index_at(position, size=size, seed=0)


def test_ranks_share_a_step_without_overlap_and_in_the_order_of_one_rank() -> None:
    whole = list(PositionSampler(global_batch=12, steps=5))
    for world in (1, 2, 3, 4, 12):
        ranks = [list(PositionSampler(global_batch=12, steps=5, rank=rank, world=world)) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole
    assert sum(whole, []) == list(range(60))


def test_resume_at_a_step_goes_on_with_the_rest() -> None:
    whole = list(PositionSampler(global_batch=4, steps=9, rank=1, world=2))
    rest = PositionSampler(global_batch=4, steps=9, start_step=6, rank=1, world=2)
    assert len(rest) == 3
    assert list(rest) == list(rest) == whole[6:]
    assert list(PositionSampler(global_batch=4, steps=9, start_step=9)) == []
    assert len(PositionSampler(global_batch=4, steps=9, start_step=11)) == 0


@pytest.mark.parametrize("batch", [0, 7, -2])
def test_batch_that_does_not_divide_by_the_ranks_is_refused(batch: int) -> None:
    with pytest.raises(UserError, match=f"batch of {batch} images .* positive multiple of 2"):
        PositionSampler(global_batch=batch, steps=1, world=2)


@pytest.mark.parametrize("wrong", [{"rank": 2, "world": 2}, {"rank": -1}, {"start_step": -1}, {"steps": -1}])
def test_ranks_and_steps_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        PositionSampler(**{"global_batch": 2, "steps": 1, **wrong})


class Positions(torch.utils.data.Dataset[int]):
    def __getitem__(self, position: int) -> int:
        return position * 1000 + index_at(position, size=6, seed=0)


def test_a_dataloader_takes_it_as_batch_sampler() -> None:
    loader = DataLoader(Positions(), batch_sampler=PositionSampler(global_batch=4, steps=3, start_step=1, world=2))
    assert len(loader) == 2
    batches = [batch.tolist() for batch in loader]
    assert [[value // 1000 for value in batch] for batch in batches] == [[4, 5], [8, 9]]
