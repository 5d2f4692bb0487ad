"""From one stage to the next: what carries over, and what is dropped by name (RECIPE.md, last section)."""

from pathlib import Path

from torch import nn

from prx_model.ema import EMA
from train import checkpoint
from train.errors import UserError
from train.optimizers import Optimizers
from train.recipes import Recipe
from train.run_folder import run_folder

DROPPED = ("repa",)
"""Modules of the stage before that a stage without them does without, their optimizer state too."""


def finished(recipe: Recipe) -> bool:
    """Whether the run of a stage has its last checkpoint."""
    done = checkpoint.complete(run_folder(recipe))
    return bool(done) and int(done[-1].name.removeprefix("step-")) >= recipe.train.steps


def carry_over(previous: Path, modules: dict[str, nn.Module], ema: EMA, optimizers: Optimizers) -> int:
    """Load weights, averages and optimizer state of the stage before; gives the global position after its last sample.

    Args:
        previous: folder of the stage before.
        modules: what is trained now, by name.

    Raises:
        UserError: no whole checkpoint there, or one that does not fit; only modules in `DROPPED` may be left out.
    """
    saved, messages = checkpoint.load_newest(previous)
    if saved is None:
        raise UserError("; ".join([*messages, f"{previous} has no whole checkpoint to start the next stage from"]))
    files = set(saved.tensors) - {"ema", "optimizer"}
    dropped = {name for name in files - modules.keys() if name in DROPPED}
    if files - dropped != modules.keys():
        odd = ", ".join(sorted((files - dropped) ^ modules.keys()))
        raise UserError(f"the checkpoint of {previous} and this stage do not hold the same modules: {odd}")
    try:
        for name, module in modules.items():
            module.load_state_dict(saved.tensors[name])
        ema.load_state_dict(saved.tensors["ema"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint of {previous} does not fit this stage: {reason}") from None
    state = saved.tensors["optimizer"]
    optimizers.load_state_dict({key: value for key, value in state.items() if key.split(".")[0] not in dropped})
    return int(saved.state["position"])
