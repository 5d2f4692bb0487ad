"""The lines that tell a user what a run is and how it does, beside its progress: at the start, at evaluations."""

from collections.abc import Mapping
from pathlib import Path

import torch

from train.data.readers import ImageDataset
from train.learner.optimizers import Named
from train.ranks.parallel import World, compute_dtype
from train.recipes import Recipe


def start_line(recipe: Recipe, world: World, folder: Path, parameters: Named, data: object) -> str:
    """What is trained, on what, with what, where it is written and how to watch it."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    ranks = name if world.size == 1 else f"{world.size} x {name}"
    numbers = sum(parameter.numel() for _, parameter in parameters)
    dtype = str(compute_dtype(recipe.train, world.device)).removeprefix("torch.")
    source = f"{len(data):,} pictures" if isinstance(data, ImageDataset) else f"{recipe.data.kind} drawn on the fly"
    return (
        f"{recipe.preset}: {numbers:,} parameters on {ranks} in {dtype}; {source} of {recipe.data.height}x"
        f"{recipe.data.width}, batch {recipe.train.batch}, {recipe.train.steps:,} steps; writes {folder}; "
        f"watch it with: tensorboard --logdir {folder.parent}"
    )


def evaluation_line(step: int, scores: Mapping[str, float], grid: Path | None) -> str | None:
    """What an evaluation on the way found; None where it measured and drew nothing."""
    found = [f"{name} {value:.4g}" for name, value in scores.items() if "/t=" not in name]
    if grid is not None:
        found.append(f"samples: {grid}")
    return f"step {step}: {'; '.join(found)}" if found else None
