"""Which sample stands at a global position, and which positions a rank takes at a step.

The order is a function of (seed, epoch) alone, so where a run stands is one number: the step.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.randomness import generator

_EPOCHS_KEPT = 4
"""Permutations in memory at once, 40 MB each at 10 million samples: train and validation, over an epoch's border."""


def index_at(position: int, *, size: int, seed: int) -> int:
    """The sample (0 … size - 1) at a global position (0, 1, 2, … over all epochs); each stands once in an epoch.

    Epoch = position // size; each epoch has its own permutation, drawn from (seed, epoch). Random access costs under a
    microsecond once the epoch's permutation is made (two seconds for 10 million samples, once a process and epoch).
    Raises ValueError for a negative position or a size below 1.
    """
    if position < 0 or size < 1:
        raise ValueError(f"position must be >= 0 and size >= 1, got position {position} and size {size}")
    epoch, within = divmod(position, size)
    return int(_permutation(seed, size, epoch)[within])


class PositionSampler:
    """Batches of global positions for one rank; give it to a DataLoader as `batch_sampler`.

    Step s covers the global positions s · global_batch … (s + 1) · global_batch - 1, of which rank r of `world` takes
    the r-th contiguous slice: the samples of a step, in order, are the same at any world size. `steps` is where the run
    ends, counted from its beginning; `start_step` is where it goes on after a resume, and is the whole state. A second
    stage goes on in the data behind the first: its positions begin at `first_position`.

    Yields lists of global_batch / world ints, (steps - start_step) of them. Raises UserError where `global_batch` is
    not a positive multiple of `world`, ValueError where rank, start_step or steps are out of range.
    """

    def __init__(
        self,
        *,
        global_batch: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        first_position: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0 … {world - 1}, got {rank}")
        if start_step < 0 or steps < 0 or first_position < 0:
            raise ValueError(
                f"start_step, steps and first_position must be >= 0, got {start_step}, {steps} and {first_position}"
            )
        if global_batch < 1 or global_batch % world:
            raise UserError(
                f"the batch of {global_batch} images over all ranks does not divide by {world} ranks; "
                f"take a positive multiple of {world}"
            )
        self.global_batch, self.steps, self.start_step = global_batch, steps, start_step
        self.rank, self.world, self.first_position = rank, world, first_position

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step)

    def __iter__(self) -> Iterator[list[int]]:
        local = self.global_batch // self.world
        for step in range(self.start_step, self.steps):
            first = self.first_position + step * self.global_batch + self.rank * local
            yield list(range(first, first + local))


def draw_order(seed: int, size: int, epoch: int) -> NDArray[Any]:
    """One epoch's order: (size,), uint32 (uint64 from 2^32 samples on), read-only."""
    # Sorted raw Philox words rather than Generator.permutation: numpy keeps the bit stream for ever, the shuffle's
    # algorithm may change (NEP 19), and a resume under a newer numpy must not change the order.
    words = generator(seed, purpose="order", position=epoch).bit_generator.random_raw(size)
    order: NDArray[Any] = np.argsort(words, kind="stable").astype(np.uint32 if size <= 2**32 else np.uint64)
    order.flags.writeable = False
    return order


_permutation = lru_cache(maxsize=_EPOCHS_KEPT)(draw_order)
