"""A trained model from a run's folder or one of its checkpoints, ready to draw."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from prx_model.wrappers import unwrapped
from train.checkpoint import checkpointer as checkpoint
from train.errors import UserError
from train.learner.build import Modules, build
from train.recipes import Recipe
from train.run.folder import CHECKPOINTS, CONFIG, read_config
from train.shown import tell


@dataclass(frozen=True)
class Trained:
    """Modules with the weights of a checkpoint, in evaluation mode."""

    modules: Modules
    recipe: Recipe
    step: int
    folder: Path
    """The checkpoint."""


def load_trained(path: Path, device: torch.device, *, weights: Literal["ema", "raw"] = "ema") -> Trained:
    """Load the newest whole checkpoint of a run's folder, naming damaged ones on stderr, or a given step-N folder.

    Args:
        path: runs/<name>, or runs/<name>/checkpoints/step-N.
        device: where the modules go.
        weights: averaged or as trained.

    Raises:
        UserError: no such folder, no checkpoint in it, a damaged one, or weights that do not fit their config.json.
    """
    saved, folder = _find(path, ("ema",) if weights == "ema" else ("model", "tower"))
    recipe = read_config(folder)
    # Prompts are anyone's: they are encoded, and not looked for in the cache of the training captions.
    recipe = replace(recipe, text=replace(recipe.text, cache="", storage="bf16"))
    modules = build(recipe, device)
    for name, module in modules.trained().items():
        prefix = f"{name}."
        if weights == "raw":
            state = saved.tensors.get(name, {})
        else:
            averages = saved.tensors.get("ema", {})
            state = {k.removeprefix(prefix): v for k, v in averages.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(unwrapped(state))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"the weights in {folder} do not fit the model of its {CONFIG}: {reason}") from None
        module.eval().requires_grad_(False)
    return Trained(modules, recipe, saved.step, folder)


def _find(path: Path, names: tuple[str, ...]) -> tuple[checkpoint.Saved, Path]:
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; give a run's folder, or one of its {CHECKPOINTS}/step-N")
    if (path / CHECKPOINTS).is_dir():
        messages = []
        for folder in reversed(checkpoint.complete(path)):
            try:
                found = checkpoint.load(folder, names=names), folder
            except UserError as error:
                messages.append(str(error))
                continue
            for message in messages:
                tell(f"warning: {message}; taking the checkpoint before it", file=sys.stderr)
            return found
        raise UserError(
            "; ".join(messages) or f"{path} has no complete checkpoint yet; let the run go on until it saves"
        )
    if not (path / CONFIG).exists():
        raise UserError(f"{path} is neither a run's folder nor a checkpoint (it has no {CONFIG})")
    return checkpoint.load(path, names=names), path
