"""Aspect-ratio buckets: sizes, order and schedule at the level of numbers, and real batches of real pictures."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.data.buckets import BucketPlan, assign, bucket_sizes, merge_small
from train.data.loader import Batch, batches, bucket_counts, by_size, notes, open_dataset, open_validation
from train.data.readers import ImageDataset
from train.errors import UserError
from train.ranks.parallel import World
from train.recipes import Recipe, prx_512

from .picture_files import plain, sentence, write_parquet

CPU = torch.device("cpu")
SIZES = bucket_sizes(1024, 1024, 32)


# Sizes


def test_there_are_27_sizes_at_1024_and_13_at_512() -> None:
    assert len(SIZES) == 27
    assert len(bucket_sizes(512, 512, 32)) == 13
    assert (SIZES[0], SIZES[13], SIZES[-1]) == ((1440, 704), (1024, 1024), (704, 1440))


@pytest.mark.parametrize(("height", "width", "patch"), [(1024, 1024, 32), (512, 512, 32), (64, 96, 8), (32, 32, 32)])
def test_sizes_are_multiples_of_the_patch_of_nearly_the_area(height: int, width: int, patch: int) -> None:
    sizes = bucket_sizes(height, width, patch)
    assert (height, width) in sizes
    assert all(h % patch == 0 and w % patch == 0 and h * w <= height * width for h, w in sizes)
    assert all(h * w > height * width - patch * max(h, w) for h, w in sizes)
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(set(ratios))
    assert {(w, h) for h, w in sizes} - {(width, height)} <= set(sizes)


def test_sides_off_the_patch_are_refused() -> None:
    assert "500x512 must be positive multiples of the patch size 32" in sentence(lambda: bucket_sizes(500, 512, 32))


def test_pictures_go_to_the_nearest_log_ratio() -> None:
    pictures = np.array([[1024, 1024], [100, 1000], [1000, 100], [3000, 2000], [0, 50], [1030, 1000]], np.int32)
    found = [SIZES[n] for n in assign(pictures, SIZES, (1024, 1024))]
    assert found == [(1024, 1024), (704, 1440), (1440, 704), (1248, 832), (1024, 1024), (1024, 1024)]
    random = np.random.default_rng(0).integers(1, 4000, (300, 2)).astype(np.int32)
    for (high, wide), number in zip(random.tolist(), assign(random, SIZES, (1024, 1024)), strict=True):
        gaps = [abs(np.log(wide / high) - np.log(w / h)) for h, w in SIZES]
        assert gaps[number] == pytest.approx(min(gaps))


def test_stretched_pictures_go_to_the_nearest_ratio_itself() -> None:
    random = np.random.default_rng(0).integers(1, 4000, (300, 2)).astype(np.int32)
    linear = assign(random, SIZES, (1024, 1024), linear=True)
    for (high, wide), number in zip(random.tolist(), linear, strict=True):
        gaps = [abs(wide / high - w / h) for h, w in SIZES]
        assert gaps[number] == pytest.approx(min(gaps))
    assert (linear != assign(random, SIZES, (1024, 1024))).any()


# Small buckets


def test_bucket_smaller_than_the_batch_is_merged_into_the_nearest_ratio() -> None:
    counts = {(704, 1440): 3, (736, 1376): 2, (1024, 1024): 100, (1440, 704): 9, (832, 1248): 0}
    merges = merge_small(counts, 8)
    assert [(m.size, m.count, m.into) for m in merges] == [
        ((736, 1376), 2, (704, 1440)),
        ((704, 1440), 5, (1024, 1024)),
    ]
    assert merge_small(counts, 2) == []
    plan = BucketPlan(np.repeat(np.arange(5), list(counts.values())).astype(np.int16), list(counts), batch=8, seed=0)
    assert plan.counts == {(1024, 1024): 105, (1440, 704): 9}


def test_fewer_samples_than_a_batch_is_one_sentence() -> None:
    message = sentence(lambda: merge_small({(8, 8): 3, (8, 16): 4}, 8))
    assert message.startswith("the data have 7 samples, fewer than the 8 of one step over all ranks (train.batch)")
    assert merge_small({(8, 8): 4, (8, 16): 4}, 8) != []


# Order


def make_plan(counts: list[int], batch: int, seed: int = 0, first_position: int = 0) -> BucketPlan:
    """Rows in a mixed order, a bucket of SIZES for each count."""
    bucket_of = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    bucket_of = np.random.default_rng(1).permutation(bucket_of)
    return BucketPlan(bucket_of, SIZES[: len(counts)], batch=batch, seed=seed, first_position=first_position)


def rows(plan: BucketPlan, steps: range) -> list[list[int]]:
    return [[plan.at(plan.first_position + s * plan.batch + i).row for i in range(plan.batch)] for s in steps]


@pytest.mark.parametrize("counts", [[8], [11], [15], [16], [8, 9, 17, 40], [100, 23, 8]])
def test_each_epoch_of_a_bucket_has_each_row_once_and_no_batch_has_a_row_twice(counts: list[int]) -> None:
    plan = make_plan(counts, batch=8)
    streams: dict[int, list[int]] = {}
    for step in range(400):
        places = [plan.at(step * 8 + i) for i in range(8)]
        assert len({place.bucket for place in places}) == 1
        assert len({place.row for place in places}) == 8, "a batch over an epoch's border has a row twice"
        streams.setdefault(places[0].bucket, []).extend(place.row for place in places)
    assert len(streams) == len(counts)
    for bucket, stream in streams.items():
        size = len(plan.rows[bucket])
        epochs = [stream[first : first + size] for first in range(0, len(stream) - size + 1, size)]
        assert all(sorted(epoch) == plan.rows[bucket].tolist() for epoch in epochs)
        assert size == 8 or epochs[0] != epochs[1]


def test_buckets_come_in_proportion_to_their_pictures_at_every_point() -> None:
    counts = [900, 300, 50, 20, 700, 33]
    plan = make_plan(counts, batch=16)
    seen = np.zeros(len(counts))
    for step in range(3000):
        seen[plan.at(step * 16).bucket] += 1
        gap = np.abs(seen - (step + 1) * np.array(counts) / sum(counts))
        assert gap.max() < 3


def test_any_position_is_reached_without_those_before_it() -> None:
    counts = [8, 9, 50, 120]
    walked = make_plan(counts, batch=8)
    order = rows(walked, range(600))
    for step in (599, 311, 17, 598, 0, 40):
        assert rows(make_plan(counts, batch=8), range(step, step + 1)) == [order[step]]
        assert rows(walked, range(step, step + 1)) == [order[step]]


def test_order_is_the_one_written_down_here() -> None:
    """A resume under another version of numpy or of this project must not change the order."""
    plan = make_plan([5, 9], batch=4)
    assert rows(plan, range(6)) == WRITTEN
    assert rows(make_plan([5, 9], batch=4, seed=1), range(6)) != WRITTEN


WRITTEN = [[6, 11, 12, 7], [13, 8, 9, 5], [10, 4, 1, 3], [2, 1, 10, 11], [0, 9, 13, 5], [12, 4, 3, 7]]


def test_a_second_stage_goes_on_behind_the_first() -> None:
    """With another batch, and sizes of its own: neither from the beginning nor in the first one's order."""
    whole = make_plan([40, 30], batch=4)
    later = make_plan([40, 30], batch=4, first_position=37 * 4)
    assert rows(later, range(20)) == rows(whole, range(37, 57))
    other = make_plan([40, 30], batch=6, first_position=37 * 4)
    assert rows(other, range(3)) == rows(make_plan([40, 30], batch=6), range(25, 28))
    with pytest.raises(ValueError, match="before the stage's first"):
        other.at(37 * 4 - 1)


# Pictures


def data(folder: Path, shapes: list[tuple[int, int]], **columns: Any) -> Path:
    """A parquet file of grey pictures, (width, height) each, whose level is the row's number."""
    pictures = [plain(n, size) for n, size in enumerate(shapes)]
    return write_parquet(folder / "train.parquet", len(shapes), image=pictures, **columns).parent


def recipe(path: Path, **changes: Any) -> Recipe:
    made = prx_512()
    settings = {"path": str(path), "height": 32, "width": 32, "workers": 0, **changes.pop("data", {})}
    return replace(made, data=replace(made.data, **settings), train=replace(made.train, steps=12, batch=4, **changes))


def read(made: Recipe, world: World = World(0, 1, CPU), start: int = 0, first: int = 0) -> list[Batch]:  # noqa: B008
    return list(batches(open_dataset(made.data, 0, 8), made, world, start, first))


MIXED = [(64, 64), (60, 30), (30, 60), (90, 45), (64, 60), (40, 80), (33, 66), (128, 64), (50, 50), (80, 40)] * 3


def test_a_step_has_one_size_on_all_ranks_and_the_same_samples_at_any_world_size(tmp_path: Path) -> None:
    made = recipe(data(tmp_path, MIXED))
    whole = read(made)
    assert {tuple(batch.image.shape[2:]) for batch in whole} == {(32, 32), (24, 40), (40, 24)}
    for world in (2, 4):
        ranks = [read(made, World(rank, world, CPU)) for rank in range(world)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            assert torch.equal(torch.cat([part.image for part in parts]), whole[step].image)
            assert sum((part.captions for part in parts), []) == whole[step].captions
    levels = [int(image[0, 0, 0]) for batch in whole for image in batch.image]
    assert all(count <= 2 for count in Counter(levels).values())  # 48 of 30, no bucket beyond its second epoch
    for batch in whole:
        assert [f"grey {int(image[0, 0, 0])}" for image in batch.image] == batch.captions


def test_resume_in_the_middle_of_an_epoch_goes_on_with_the_same_batches_also_in_workers(tmp_path: Path) -> None:
    made = recipe(data(tmp_path, MIXED))
    whole = read(made)
    for again in (read(made, start=5), read(recipe(tmp_path, data={"workers": 2}), start=5)):
        assert len(again) == 7
        for one, other in zip(again, whole[5:], strict=True):
            assert torch.equal(one.image, other.image)
            assert one.captions == other.captions
            assert torch.equal(one.positions, other.positions)


def test_size_columns_are_believed_and_headers_read_without_them(tmp_path: Path) -> None:
    shapes = [(64, 64)] * 4 + [(30, 60)] * 4
    made = recipe(data(tmp_path, shapes))
    counts = bucket_counts(open_dataset(made.data, 0, 8))
    assert {size: n for size, n in counts.items() if n} == {(40, 24): 4, (32, 32): 4}
    told = data(tmp_path / "told", shapes, width=[60] * 8, height=[30] * 8)
    counts = bucket_counts(open_dataset(recipe(told).data, 0, 8))
    assert {size: n for size, n in counts.items() if n} == {(24, 40): 8}


def test_sizes_are_kept_in_the_index_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(data(tmp_path / "data", MIXED), data={"index_cache": str(tmp_path / "cache")})
    first = open_dataset(made.data, 0, 8)
    monkeypatch.setattr(
        "train.data.formats.parquet.ParquetIndex.sizes", lambda *_: pytest.fail("the pictures were read again")
    )
    second = open_dataset(made.data, 0, 8)
    assert isinstance(first, ImageDataset)
    assert isinstance(second, ImageDataset)
    assert first.bucket_of.tolist() == second.bucket_of.tolist()


def test_one_message_says_which_buckets_are_merged_and_none_hangs(tmp_path: Path) -> None:
    made = recipe(data(tmp_path, [(64, 64)] * 9 + [(30, 60), (60, 30)]))
    dataset = open_dataset(made.data, 0, 8)
    assert notes(dataset, 4) == (
        "buckets with fewer pictures than train.batch 4 are merged: 24x40 (1 pictures) into 32x32, "
        "40x24 (1 pictures) into 32x32",
    )
    found = read(made)
    assert {tuple(batch.image.shape[2:]) for batch in found} == {(32, 32)}
    assert {int(image[0, 0, 0]) for batch in found for image in batch.image} == set(range(11))


@pytest.mark.parametrize("buckets", [True, False])
def test_fewer_samples_than_ranks_or_a_batch_stop_with_a_sentence(tmp_path: Path, buckets: bool) -> None:
    made = recipe(data(tmp_path, [(64, 64)] * 3), data={"buckets": buckets})
    dataset = open_dataset(made.data, 0, 8)
    for call in (lambda: notes(dataset, 4), lambda: batches(dataset, made, World(3, 4, CPU), 0)):
        with pytest.raises(UserError, match="the data have 3 samples, fewer than the 4 of one step"):
            call()


def test_held_out_numbers_come_by_size_and_none_is_lost(tmp_path: Path) -> None:
    data(tmp_path, MIXED)
    (tmp_path / "train.parquet").rename(tmp_path / "val.parquet")
    validation = open_validation(recipe(tmp_path).data, 8)
    assert validation is not None
    found = by_size(validation, 25)
    assert sorted(number for numbers in found for number in numbers) == list(range(25))
    assert all(numbers == sorted(numbers) for numbers in found)
    sizes = [{validation[number].image.shape[:2] for number in numbers} for numbers in found]
    assert sorted(size for one in sizes for size in one) == [(24, 40), (32, 32), (40, 24)]
