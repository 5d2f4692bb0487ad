"""Aspect-ratio buckets: which size each picture is trained at, and which bucket and samples each step has.

A step's pictures come from one bucket on all ranks, so they have one size. Each bucket is an endless stream of its own
permuted epochs; steps take buckets in proportion to their pictures. All is a function of (seed, sizes, batch, global
position), at any world size, and any position is reached at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.data.sampler import draw_order
from train.errors import UserError
from train.randomness import derive_seed, generator

LARGEST_RATIO = 2.0
"""Of a bucket's long to its short side; the public converter of PRX has the same, and 27 buckets of about 1024 px."""

_AT_ONCE = 1 << 20
"""Pictures whose shapes are worked with at a time: tens of millions would need gigabytes of float64."""

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(height: int, width: int, patch: int) -> tuple[Size, ...]:
    """Sizes of about height x width pixels, sides multiples of `patch`, ratios 1/2 to 2, from upright to lying.

    Of each possible side the longest other one that keeps within the area, as in the converter of PRX: 27 sizes for
    1024 x 1024 and patch 32, 13 for 512 x 512. height x width itself is always one of them.

    Raises UserError for sides that are no positive multiples of the patch.
    """
    if patch < 1 or min(height, width) < patch or height % patch or width % patch:
        raise UserError(
            f"data.height x data.width {height}x{width} must be positive multiples of the patch size {patch}"
        )
    area = (height // patch) * (width // patch)
    sizes = {(height // patch, width // patch)}
    for side in range(1, math.isqrt(2 * area) + 1):
        if 2 * side * side >= area:  # integers, which do not lose the sides at the very bound
            sizes |= {(side, area // side), (area // side, side)}
    ordered = sorted(sizes, key=lambda size: (size[1] / size[0], size))
    return tuple((high * patch, wide * patch) for high, wide in ordered)


def assign(
    pictures: NDArray[np.int32], sizes: Sequence[Size], unknown: Size, *, linear: bool = False
) -> NDArray[np.int16]:
    """The bucket (index into `sizes`) nearest to each picture in log aspect ratio: (n,), int16.

    `pictures` is (n, 2), height and width; those with a 0 go to the bucket of size `unknown`. With `linear` nearest in
    width over height itself, as PRX does: tall pictures then go to taller buckets.
    """
    scale = np.asarray if linear else np.log
    ratios = scale([width / height for height, width in sizes])
    borders = (ratios[1:] + ratios[:-1]) / 2
    found = np.full(len(pictures), list(sizes).index(unknown), np.int16)
    for first in range(0, len(pictures), _AT_ONCE):
        part = pictures[first : first + _AT_ONCE]
        known = (part > 0).all(axis=1)
        high, wide = (np.where(known, part[:, axis], 1).astype(np.float64) for axis in (0, 1))
        nearest = np.searchsorted(borders, scale(wide / high))
        np.copyto(found[first : first + _AT_ONCE], nearest, where=known, casting="same_kind")
    return found


@dataclass(frozen=True)
class Merge:
    """A bucket that has fewer pictures than a batch, and the one that took them."""

    size: Size
    count: int
    into: Size


def merge_small(counts: dict[Size, int], batch: int) -> list[Merge]:
    """Merges that leave no bucket with 1 … batch - 1 pictures, in their order: always the smallest into the nearest.

    Near is in log aspect ratio. Raises UserError for fewer pictures than one batch.
    """
    total = sum(counts.values())
    if total < batch:
        raise too_few(total, batch)
    left = {size: count for size, count in counts.items() if count}
    merges: list[Merge] = []
    while (smallest := min(left, key=lambda size: (left[size], size))) and left[smallest] < batch:
        count = left.pop(smallest)
        into = min(left, key=lambda size: (abs(_log_ratio(size) - _log_ratio(smallest)), size))
        left[into] += count
        merges.append(Merge(smallest, count, into))
    return merges


def too_few(samples: int, batch: int) -> UserError:
    """The data have fewer pictures than a step takes."""
    return UserError(
        f"the data have {samples} samples, fewer than the {batch} of one step over all ranks (train.batch), which "
        f"would show some twice; give more data, or --train.batch of at most {samples}"
    )


def describe(merges: Sequence[Merge], batch: int) -> str:
    """The merges in one sentence."""
    listed = [f"{_name(m.size)} ({m.count} pictures) into {_name(m.into)}" for m in merges]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return f"buckets with fewer pictures than train.batch {batch} are merged: {', '.join(listed[:4])}{more}"


@dataclass(frozen=True)
class Place:
    """What stands at a global position."""

    row: int
    size: Size
    bucket: int


class BucketPlan:
    """Which row at which size stands at each global position of a stage.

    A stage takes `batch` pictures a step and begins at `first_position`; its schedule goes on as if it had had this
    batch size from the beginning, so a second stage does not see the first one's order again.

    No sample comes twice in a batch, nor in an epoch of its bucket; each comes once in an epoch.
    """

    def __init__(
        self, bucket_of: NDArray[np.int16], sizes: Sequence[Size], *, batch: int, seed: int, first_position: int = 0
    ) -> None:
        """`bucket_of` gives each row's bucket as an index into `sizes`. Raises UserError for too few pictures."""
        if first_position < 0 or batch < 1:
            raise ValueError(f"first_position must be >= 0 and batch >= 1, got {first_position} and {batch}")
        counts = np.bincount(bucket_of, minlength=len(sizes))
        target = {size: size for size in sizes}
        self.merges = merge_small(dict(zip(sizes, counts.tolist(), strict=True)), batch)
        for merge in self.merges:
            target = {size: merge.into if now == merge.size else now for size, now in target.items()}
        final = np.array([list(sizes).index(target[size]) for size in sizes], dtype=np.int16)[bucket_of]
        numbers = [number for number in range(len(sizes)) if (final == number).any()]
        self.sizes: list[Size] = [sizes[number] for number in numbers]
        self.rows = [np.flatnonzero(final == number).astype(np.uint32) for number in numbers]
        self.batch, self.seed, self.first_position = batch, seed, first_position
        self._first_step = -(-first_position // batch)
        self._shifts = [
            generator(seed, purpose="bucket schedule", position=h << 32 | w).random() for h, w in self.sizes
        ]
        self._schedule: tuple[NDArray[np.int16], NDArray[np.int64]] | None = None
        self._orders: list[dict[int, NDArray[np.uint32]]] = [{} for _ in numbers]

    @property
    def counts(self) -> dict[Size, int]:
        """Pictures of each bucket."""
        return {size: len(rows) for size, rows in zip(self.sizes, self.rows, strict=True)}

    def at(self, position: int) -> Place:
        """What stands at a global position of this stage. Raises ValueError for one before it."""
        step, within = divmod(position - self.first_position, self.batch)
        if step < 0:
            raise ValueError(f"position {position} is before the stage's first, {self.first_position}")
        bucket, number = self._scheduled(self._first_step + step)
        rows = self.rows[bucket]
        epoch, at = divmod(number * self.batch + within, len(rows))
        return Place(int(rows[self._order(bucket, epoch)[at]]), self.sizes[bucket], bucket)

    def _scheduled(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it had before.

        A bucket with the share w of the pictures has its k-th step due at (k + shift) / w; steps come in due order, so
        after s of them a bucket has had w · s but for the rounding of all buckets.
        """
        if self._schedule is None or step >= len(self._schedule[0]):
            length = max(1024, 2 * step)
            total = sum(map(len, self.rows))
            parts = []
            for bucket, (rows, shift) in enumerate(zip(self.rows, self._shifts, strict=True)):
                share = len(rows) / total
                numbers = np.arange(int((length + len(self.rows)) * share) + 2)
                parts.append(((numbers + shift) / share, np.full(numbers.shape, bucket, np.int16), numbers))
            due, buckets, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.lexsort((buckets, due))[:length]
            self._schedule = buckets[order], numbers[order]
        return int(self._schedule[0][step]), int(self._schedule[1][step])

    def _order(self, bucket: int, epoch: int) -> NDArray[np.uint32]:
        """(n,) the order of a bucket's rows in an epoch, such that no batch over the border has a row twice."""
        known = self._orders[bucket]
        if epoch not in known:
            # Only the first `batch` of an epoch depend on the last of the one before, and those are as drawn where a
            # bucket has two batches or more. In a smaller one the chain is followed, which is short as its epochs are.
            linked = len(self.rows[bucket]) < 2 * self.batch
            number = max((e for e in known if e < epoch), default=-1) + 1 if linked else epoch
            before = known.get(number - 1)
            if before is None and number:
                before = self._draw(bucket, number - 1)
            kept = {number - 1: before} if before is not None else {}
            for following in range(number, epoch + 1):
                before = self._parted(self._draw(bucket, following), before, following)
                kept[following] = before
            self._orders[bucket] = known = {e: order for e, order in kept.items() if e >= epoch - 1}
        return known[epoch]

    def _draw(self, bucket: int, epoch: int) -> NDArray[np.uint32]:
        height, width = self.sizes[bucket]
        return draw_order(derive_seed(self.seed, purpose=f"bucket {height}x{width}"), len(self.rows[bucket]), epoch)

    def _parted(self, order: NDArray[np.uint32], before: NDArray[np.uint32] | None, epoch: int) -> NDArray[np.uint32]:
        """An epoch's order with those rows moved back that the batch over its beginning has from the epoch before."""
        shared = epoch * len(order) % self.batch
        if before is None or not shared:
            return order
        head = order[: self.batch]
        seen = np.isin(head, before[-shared:])
        return np.concatenate((head[~seen], head[seen], order[self.batch :]))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_schedule": None, "_orders": [{} for _ in self.rows]}


def _log_ratio(size: Size) -> float:
    return math.log(size[1] / size[0])


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
