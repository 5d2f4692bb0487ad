"""What a long run meets: signals to stop, ranks that hang, gradients that are not finite.

A rank that dies takes the others with it (torchrun ends them); one that hangs prints where, and dies. The same command,
or torchrun's `--max-restarts`, goes on from the last checkpoint.
"""

import faulthandler
import math
import signal
import sys
import time
from collections import deque
from dataclasses import replace
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from train.data.loader import Batch
from train.data.worker_signals import STOPPING
from train.errors import UserError
from train.ranks.parallel import World, agree

EXIT_RESUME = 75
"""Exit code of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h, "try again"."""


AGAIN_SECONDS = 2.0
"""After which another Ctrl-C is a second one."""


class Interrupted(Exception):
    """All ranks agreed to stop, in the middle of something that need not be finished."""


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 to any one rank ask all of them to save and stop; a second Ctrl-C stops at once.

    Slurm sends SIGTERM before it takes a node, or SIGUSR1 where it is told so (`--signal=USR1@120`). What comes within
    `AGAIN_SECONDS` of the first is the same request: `uv run` and torchrun pass on what the terminal sends too.
    """

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, False
        self._first = 0.0

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self._first = now
        elif number == signal.SIGINT and now - self._first > AGAIN_SECONDS:
            raise KeyboardInterrupt
        self.asked = True

    def check(self, told: int = 0) -> int:
        """Raise `Interrupted` on all ranks where one of them was asked to stop. Every rank must call it.

        Gives the largest number that any rank tells, so that one agreement a step serves two ends.
        """
        asked, most = agree([int(self.asked), told], self.world)
        if asked:
            raise Interrupted
        return most


class Watchdog:
    """Prints the stacks of all threads and ends this process when no `beat` came for `seconds`.

    A rank that waits for a dead or hanging one ends too, so torchrun can start all of them again. It is a thread of C,
    which runs while Python is stuck.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> "Watchdog":
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Something was finished: wait anew."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or sys.stderr)


class SkippedSteps:
    """Knows the samples of the last steps, and stops a run in which `limit` steps in a row were skipped.

    The count of skipped steps travels to the host beside the steps: it is known a few of them later, and nobody waits.
    """

    def __init__(self, limit: int, world: World) -> None:
        self.limit, self.world = limit, world
        self._last: deque[tuple[int, Batch, Tensor]] = deque(maxlen=limit)
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def remember(self, step: int, batch: Batch, losses: Tensor, in_a_row: Tensor) -> None:
        """Keep what names a step's samples and send for the count of steps skipped in a row; nothing is waited for."""
        image, positions = batch.image[:0], batch.host_positions
        self._last.append((step, replace(batch, image=image, positions=positions), losses))
        event = torch.cuda.Event() if in_a_row.is_cuda else None
        count = torch.empty_like(in_a_row, device="cpu", pin_memory=event is not None)
        count.copy_(in_a_row, non_blocking=True)
        if event is not None:
            event.record()
        self._under_way.append((count, event))

    def arrived(self) -> int:
        """The most steps skipped in a row by what has reached the host since the last call; 0 where nothing has."""
        most = 0
        while self._under_way and ((event := self._under_way[0][1]) is None or event.query()):
            most = max(most, int(self._under_way.popleft()[0]))
        return most

    def check(self, in_a_row: int) -> None:
        """Stop where too many steps in a row were skipped. Every rank must call it with the same number.

        Raises:
            UserError: on all ranks, naming the samples whose loss is not finite; all of the steps' where none is.
        """
        if in_a_row < self.limit:
            return
        bad = [
            (step, position, key)
            for step, batch, losses in self._last
            for position, key, loss in zip(batch.host_positions.tolist(), batch.keys, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        found = [bad]
        if self.world.size > 1:
            found = [[] for _ in range(self.world.size)]
            dist.all_gather_object(found, bad)
        named = [f"{key} (position {position}, step {step})" for part in found for step, position, key in part]
        listed = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        first, last = self._last[0][0], self._last[-1][0]
        raise UserError(
            f"the gradient of the last {in_a_row} steps was not finite, so they were skipped, and train.max_skipped is "
            f"{self.limit}; "
            + (
                f"samples with a loss that is not finite: {listed}"
                if named
                else f"every loss of steps {first} to {last} is finite, so the gradient is lost on the way back: "
                "try --train.precision fp32 or a lower learning rate"
            )
        )
