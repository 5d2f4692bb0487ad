"""Aspect-ratio buckets: which size each picture is trained at, and which bucket and samples each step has.

A step's pictures come from one bucket on all ranks, so they have one size. Each bucket is an endless stream of its own
permuted epochs; steps take buckets in proportion to their pictures. All is a function of (seed, sizes, batch, global
position), at any world size, and any position is reached at once.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Mixed:
    """Rows of several sources, and how often each source is drawn."""

    source_of: NDArray[np.int16]
    """(rows,), the source of each."""
    shares: tuple[float, ...]
    """Of the samples; they sum to 1."""
    names: tuple[str, ...]

    def rates(self) -> NDArray[np.float64]:
        """How often one row of each source is drawn, per sample."""
        return np.array(self.shares) / np.bincount(self.source_of, minlength=len(self.shares))


def bucket_counts(bucket_of: NDArray[np.int16], sizes: Sequence[Size], mixed: Mixed | None = None) -> "Counts":
    """Pictures of each bucket; a tuple with those of each source where there are several."""
    sources = mixed.source_of if mixed else np.zeros(len(bucket_of), np.int16)
    number = len(mixed.shares) if mixed else 1
    table = np.bincount(bucket_of.astype(np.int64) * number + sources, minlength=len(sizes) * number)
    return {size: tuple(row) for size, row in zip(sizes, table.reshape(-1, number).tolist(), strict=True)}


Counts = dict[Size, tuple[int, ...]]
"""Pictures of each bucket, by source."""


def merge_small(counts: Mapping[Size, int | tuple[int, ...]], batch: int, mixed: Mixed | None = None) -> list[Merge]:
    """Merges after which no batch must show a picture twice, in their order: always the smallest into the nearest.

    So no bucket has 1 … batch - 1 pictures. Of several sources, the one whose rows come most often sets the measure:
    the bucket must be large enough for its share of a batch. Near is in log aspect ratio.

    Raises UserError for fewer pictures than one batch, or than a source's share of it.
    """
    rates = mixed.rates() if mixed else np.ones(1)
    left = {size: np.atleast_1d(np.array(count)) for size, count in counts.items() if np.any(count)}
    total = sum(int(count.sum()) for count in left.values())
    if total < batch:
        raise too_few(total, batch)
    merges: list[Merge] = []
    while True:
        smallest = min(left, key=lambda size: (_room(left[size], rates), size))
        if _room(left[smallest], rates) >= batch:
            return merges
        if mixed and len(left) == 1:
            raise _too_often(left[smallest], batch, mixed)
        count = left.pop(smallest)
        into = min(left, key=lambda size: (abs(_log_ratio(size) - _log_ratio(smallest)), size))
        left[into] = left[into] + count
        merges.append(Merge(smallest, int(count.sum()), into))


def _room(count: NDArray[np.int64], rates: NDArray[np.float64]) -> int:
    """The largest batch in which no picture of a bucket must come twice; `Shares` may draw one more a source."""
    there = count > 0
    if there.sum() < 2:
        return int(count.sum())
    drawn = count[there] * rates[there]
    return max(0, int(((count[there] - there.sum()) * drawn.sum() / drawn).min()))


def _too_often(count: NDArray[np.int64], batch: int, mixed: Mixed) -> UserError:
    rates = mixed.rates()
    worst = int(rates.argmax())
    return UserError(
        f"{mixed.names[worst]} has {int(count[worst]):,} samples for {mixed.shares[worst]:.2%} of the {batch:,} of one "
        "step over all ranks (train.batch), which would show some twice; lower its weight, give it more samples, or a "
        "smaller --train.batch"
    )


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
    source: int = 0


class Shares:
    """An endless series of draws from several streams, each in proportion to its share at every point.

    One stream after the other takes its part of what those before it left: of the first n, floor(c · n + 1/2) for the
    share c. So how many of each stand before any draw is a formula, and a position is reached at once.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        rest = np.cumsum(shares[::-1])[::-1]
        self._parts = [float(min(1.0, share / left)) for share, left in zip(shares[:-1], rest[:-1], strict=True)]

    def at(self, draw: int) -> tuple[int, int]:
        """Which stream draw 0, 1, 2, … is from, and how many it had before."""
        for stream, part in enumerate(self._parts):
            before = math.floor(part * draw + 0.5)
            if math.floor(part * (draw + 1) + 0.5) > before:
                return stream, before
            draw -= before
        return len(self._parts), draw

    def before(self, draw: int, stream: int) -> int:
        """How many of the first `draw` draws are from a stream."""
        for part in self._parts[:stream]:
            draw -= math.floor(part * draw + 0.5)
        return math.floor(self._parts[stream] * draw + 0.5) if stream < len(self._parts) else draw

    def draw_of(self, stream: int, number: int) -> int:
        """The draw that is a stream's `number`-th, counted from 0."""
        high = 1
        while self.before(high, stream) <= number:
            high *= 2
        return bisect_right(range(high), number, key=lambda draw: self.before(draw, stream)) - 1


class BucketPlan:
    """Which row at which size stands at each global position of a stage.

    A stage takes `batch` pictures a step and begins at `first_position`; its schedule goes on as if it had had this
    batch size from the beginning, so a second stage does not see the first one's order again.

    No sample comes twice in a batch, nor in an epoch of its bucket; each comes once in an epoch. Of several sources
    each has epochs of its own in each bucket, and a bucket's draws are theirs in proportion to what they are worth.
    """

    def __init__(
        self,
        bucket_of: NDArray[np.int16],
        sizes: Sequence[Size],
        *,
        batch: int,
        seed: int,
        first_position: int = 0,
        mixed: Mixed | None = None,
    ) -> None:
        """`bucket_of` gives each row's bucket as an index into `sizes`. Raises UserError for too few pictures."""
        if first_position < 0 or batch < 1:
            raise ValueError(f"first_position must be >= 0 and batch >= 1, got {first_position} and {batch}")
        target = {size: size for size in sizes}
        self.merges = merge_small(bucket_counts(bucket_of, sizes, mixed), batch, mixed)
        for merge in self.merges:
            target = {size: merge.into if now == merge.size else now for size, now in target.items()}
        final = np.array([list(sizes).index(target[size]) for size in sizes], dtype=np.int16)[bucket_of]
        numbers = [number for number in range(len(sizes)) if (final == number).any()]
        self.sizes: list[Size] = [sizes[number] for number in numbers]
        self._streams: list[dict[int, NDArray[np.uint32]]] = []
        """Of each bucket, rows by source; only of sources that have some."""
        self._worth: list[float] = []
        self._shares: list[Shares] = []
        rates = mixed.rates() if mixed else np.ones(1)
        for number in numbers:
            rows = np.flatnonzero(final == number).astype(np.uint32)
            sources = mixed.source_of[rows] if mixed else None
            streams = {0: rows} if sources is None else {int(s): rows[sources == s] for s in np.unique(sources)}
            self._streams.append(streams)
            worth = [len(part) * float(rates[source]) for source, part in self._streams[-1].items()]
            self._worth.append(sum(worth))
            self._shares.append(Shares(worth))
        self.batch, self.seed, self.first_position = batch, seed, first_position
        self._first_step = -(-first_position // batch)
        self._shifts = [
            generator(seed, purpose="bucket schedule", position=h << 32 | w).random() for h, w in self.sizes
        ]
        self._schedule: tuple[NDArray[np.int16], NDArray[np.int64]] | None = None
        self._orders: dict[tuple[int, int], dict[int, NDArray[np.uint32]]] = {}

    @property
    def rows(self) -> list[NDArray[np.uint32]]:
        """Rows of each bucket, of all sources."""
        return [np.sort(np.concatenate(list(streams.values()))) for streams in self._streams]

    @property
    def counts(self) -> dict[Size, int]:
        """Pictures of each bucket."""
        return {s: sum(map(len, streams.values())) for s, streams in zip(self.sizes, self._streams, strict=True)}

    def at(self, position: int) -> Place:
        """What stands at a global position of this stage. Raises ValueError for one before it."""
        step, within = divmod(position - self.first_position, self.batch)
        if step < 0:
            raise ValueError(f"position {position} is before the stage's first, {self.first_position}")
        bucket, number = self._scheduled(self._first_step + step)
        stream, drawn = self._shares[bucket].at(number * self.batch + within)
        source, rows = list(self._streams[bucket].items())[stream]
        epoch, at = divmod(drawn, len(rows))
        return Place(int(rows[self._order(bucket, source, epoch)[at]]), self.sizes[bucket], bucket, source)

    def substitutes(self, place: Place) -> NDArray[np.uint32]:
        """Rows that may stand in the place of one: those of its bucket and source."""
        return self._streams[place.bucket][place.source]

    def _scheduled(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many steps it had before.

        A bucket with the share w of the samples has its k-th step due at (k + shift) / w; steps come in due order, so
        after s of them a bucket has had w · s but for the rounding of all buckets.
        """
        if self._schedule is None or step >= len(self._schedule[0]):
            length = max(1024, 2 * step)
            total = sum(self._worth)
            parts = []
            for bucket, (worth, shift) in enumerate(zip(self._worth, self._shifts, strict=True)):
                share = worth / total
                numbers = np.arange(int((length + len(self.sizes)) * share) + 2)
                parts.append(((numbers + shift) / share, np.full(numbers.shape, bucket, np.int16), numbers))
            due, buckets, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.lexsort((buckets, due))[:length]
            self._schedule = buckets[order], numbers[order]
        return int(self._schedule[0][step]), int(self._schedule[1][step])

    def _order(self, bucket: int, source: int, epoch: int) -> NDArray[np.uint32]:
        """(n,) the order of a stream's rows in an epoch, such that no batch over the border has a row twice."""
        known = self._orders.setdefault((bucket, source), {})
        if epoch not in known:
            # Only the first `batch` of an epoch depend on the last of the one before, and those are as drawn where a
            # stream has two batches or more. In a smaller one the chain is followed, which is short as its epochs are.
            linked = len(self._streams[bucket][source]) < 2 * self.batch
            number = max((e for e in known if e < epoch), default=-1) + 1 if linked else epoch
            before = known.get(number - 1)
            if before is None and number:
                before = self._draw(bucket, source, number - 1)
            kept = {number - 1: before} if before is not None else {}
            for following in range(number, epoch + 1):
                order = self._draw(bucket, source, following)
                before = order if before is None else self._parted(order, before, bucket, source, following)
                kept[following] = before
            self._orders[bucket, source] = known = {e: order for e, order in kept.items() if e >= epoch - 1}
        return known[epoch]

    def _draw(self, bucket: int, source: int, epoch: int) -> NDArray[np.uint32]:
        height, width = self.sizes[bucket]
        purpose = f"bucket {height}x{width}" + (f" source {source}" if source else "")
        return draw_order(derive_seed(self.seed, purpose=purpose), len(self._streams[bucket][source]), epoch)

    def _parted(
        self, order: NDArray[np.uint32], before: NDArray[np.uint32], bucket: int, source: int, epoch: int
    ) -> NDArray[np.uint32]:
        """An epoch's order with those rows moved back that the batch over its beginning has from the epoch before."""
        shares, stream = self._shares[bucket], list(self._streams[bucket]).index(source)
        border = epoch * len(order)
        batch = shares.draw_of(stream, border) // self.batch
        first, end = (shares.before((batch + more) * self.batch, stream) for more in (0, 1))
        if first == border:
            return order
        head, shared = order[: end - first], before[first - border :]
        seen = np.isin(head, shared)
        return np.concatenate((head[~seen], head[seen], order[end - first :]))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_schedule": None, "_orders": {}}


def _log_ratio(size: Size) -> float:
    return math.log(size[1] / size[0])


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
