"""`speedrun.py` with something that goes wrong in one rank, once.

torchrun tests/train/ranks/fault_run.py KIND@RANK:STEP [preset] …

KIND: a key of ACTIONS, nan, nan-from, sigusr1-drawing or die-saving. A rank dies or hangs with every checkpoint before
on disk; in "die-saving" it dies while it writes the one of STEP.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[3])

from train import speedrun  # noqa: E402
from train.checkpoint.checkpointer import Checkpointer  # noqa: E402
from train.checkpoint.storage import Writer  # noqa: E402
from train.errors import exit_with_sentence  # noqa: E402
from train.evaluation import evaluate  # noqa: E402
from train.learner import optimizers  # noqa: E402
from train.learner.step import Learner  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1e6)


ACTIONS = {
    "die": die,
    "hang": hang,
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigusr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


def wait_for_saves() -> None:
    """On every rank: a save in the background may not have ended two steps later, and then is lost with the rank."""
    save = Checkpointer.save

    def save_and_wait(self: Checkpointer, *arguments: Any, **_: Any) -> None:
        save(self, *arguments, wait=True)

    Checkpointer.save = save_and_wait  # type: ignore[method-assign]


def inject(fault: str) -> None:
    kind, _, where = fault.partition("@")
    rank, step = (int(number) for number in where.split(":"))
    if kind in ("die", "hang"):
        wait_for_saves()
    mine = int(os.environ["RANK"]) == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if not mine:
        return
    make_step, make_loss, draw, write = Learner.step, Learner._loss, evaluate.draw, Writer.write_data

    def bad_step(self: Learner, batch: Any, number: int) -> Any:
        if number == step:
            ACTIONS[kind]()
        return make_step(self, batch, number)

    def bad_loss(self: Learner, batch: Any, number: int) -> Any:
        loss, parts, losses, bins = make_loss(self, batch, number)
        if number >= step and (number == step or kind == "nan-from"):
            return loss * torch.nan, parts, torch.where(batch.positions % 3 == 0, torch.nan, losses), bins
        return loss, parts, losses, bins

    def bad_draw(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return draw(*arguments, **named)

    def bad_write(self: Writer, *arguments: Any) -> Any:
        if self.step == step:
            die()
        return write(self, *arguments)

    if kind.startswith("nan"):
        Learner._loss = bad_loss  # type: ignore[method-assign]
    elif kind == "sigusr1-drawing":
        evaluate.draw = bad_draw
    elif kind == "die-saving":
        Writer.write_data = bad_write  # type: ignore[method-assign]
    else:
        Learner.step = bad_step  # type: ignore[method-assign]


if __name__ == "__main__":
    inject(sys.argv.pop(1))
    # Rounded to bfloat16, Newton-Schulz makes up to 480 times as much of the last bit, in which world sizes differ.
    optimizers._newton_schulz_dtype = lambda device: torch.float32
    exit_with_sentence(speedrun.main)
