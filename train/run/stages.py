"""What carries over from one stage to the next, and what is dropped (docs/recipe.md, "From stage 1 to stage 2")."""

from pathlib import Path

from train.checkpoint import checkpointer as checkpoint
from train.checkpoint.checkpointer import Tensors
from train.checkpoint.state import need
from train.errors import UserError
from train.ranks.agreement import Group
from train.recipes import Recipe
from train.run.folder import run_folder

DROPPED = ("repa",)
"""Modules of the stage before that a stage without them does without, their optimizer state too."""


def finished(recipe: Recipe) -> bool:
    """Whether the run of a stage has its last checkpoint."""
    done = checkpoint.complete(run_folder(recipe))
    return bool(done) and int(done[-1].name.removeprefix("step-")) >= recipe.train.steps


def carry_over(previous: Path, tensors: Tensors, group: Group = None) -> int:
    """Load weights, averages and optimizer state of the stage before; gives the global position after its last sample.

    Args:
        previous: folder of the stage before.
        tensors: what is trained now, by section and name; filled in place.
        group: of all ranks, with a gloo backend.

    Raises:
        UserError: no whole checkpoint there, or one that does not fit; only modules in `DROPPED` may be left out.
    """
    found = checkpoint.find_newest(previous, group)
    if found is None:
        raise UserError(f"{previous} has no whole checkpoint to start the next stage from")
    checkpoint.load_into(found, tensors, group, dropped=DROPPED)
    (position,) = need(found.folder, found.state, "position")
    return int(position)
