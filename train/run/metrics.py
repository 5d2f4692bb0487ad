"""What a run tells: metrics.jsonl and TensorBoard events in its folder, one progress display on the console."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.errors import UserError
from train.run.folder import METRICS
from train.shown import address, printable, tell
from train.side_files import objects, set_aside, write_whole

_PLAIN_SECONDS = 10.0
"""Between two lines where the console is no terminal."""


class Metrics:
    """Writes scalars to metrics.jsonl and TensorBoard; silent on ranks other than 0.

    A disk that takes nothing is a warning the first time, and stops the run the second time in a row.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self.enabled, self.path, self._failed = enabled, folder / METRICS, False
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            # Not buffered: what could not be written must not come again, half, when the file is closed.
            self._file = self.path.open("ab", buffering=0)
            self._board = SummaryWriter(str(folder))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step; keys like "train/loss". What is not finite is no JSON, and is left out.

        Raises:
            UserError: the disk takes nothing, for the second time in a row.
        """
        if not self.enabled:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
        with self._allowed_to_fail_once():
            self._append(line.encode())
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a picture from disk in TensorBoard; errors as in `log`."""
        if self.enabled:
            with self._allowed_to_fail_once(), Image.open(path) as opened:
                self._board.add_image(name, np.asarray(opened.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close both files; a disk that is full now has been told of."""
        if self.enabled:
            self._file.close()
            with suppress(OSError):
                self._board.close()

    def _append(self, line: bytes) -> None:
        """Add a line, or nothing of it."""
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(before)
            raise

    @contextmanager
    def _allowed_to_fail_once(self) -> Iterator[None]:
        try:
            yield
            self._failed = False
        except OSError as error:
            sentence = f"{self.path} cannot be written ({error.strerror or error}); make room on its disk"
            if self._failed:
                raise UserError(f"{sentence} and start the same command again") from None
            self._failed = True
            tell(f"warning: {sentence}: the run stops when it fails again")


def drop_metrics_after(folder: Path, step: int) -> None:
    """Remove lines of metrics.jsonl beyond a step: a resumed run writes them again."""
    path = folder / METRICS
    if not path.exists():
        return
    lines, bad = objects(path)
    if bad:
        tell(f"warning: {set_aside(path, bad)}")
    kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


class Display:
    """One live progress line on a terminal; a plain line every ten seconds elsewhere; silent when disabled."""

    def __init__(self, steps: int, start: int, *, enabled: bool) -> None:
        self.steps, self.start, self.enabled = steps, start, enabled
        self.console = Console(file=sys.stdout, highlight=False)
        self.live = enabled and self.console.is_terminal
        self._last_line = 0.0
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )

    def __enter__(self) -> "Display":
        if self.live:
            self._progress.start()
            self._task = self._progress.add_task("train", total=self.steps, completed=self.start, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()

    def tick(self, step: int) -> None:
        """Move the bar; where there is none, nothing."""
        if self.live:
            self._progress.update(self._task, completed=step)

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Show the state after `step` steps; values: loss, images/s, and MFU where it is known."""
        if not self.enabled:
            return
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.live:
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if now - self._last_line < _PLAIN_SECONDS and step < self.steps:
            return
        self._last_line = now
        done = step - self.start
        left = (now - self._began) / done * (self.steps - step) if done else 0.0
        print(f"step {step}/{self.steps}  {numbers}  {left / 60:.1f} min left", flush=True)

    def say(self, message: str) -> None:
        """Print a line above the progress display."""
        if self.enabled:
            self.console.print(printable(address(message)), markup=False, soft_wrap=True)
