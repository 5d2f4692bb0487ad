"""Train a text-to-image model by a preset, draw it, and say how well it follows its prompts.

torchrun --standalone train/speedrun.py [preset] [--section.field value ...]
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
# OpenMP threads that spin for milliseconds at every barrier stand still where two cores are shared with anything else
# (`shapes` beside one busy core: 204 pictures/s, 9 at worst; 249 with this). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from train.commandline import parse  # noqa: E402
from train.errors import exit_with_sentence  # noqa: E402


def main() -> int:
    command = parse(sys.argv[1:])

    from train.recipes import TwoStages

    recipe = command.recipe
    if command.dry_run.enabled:
        from train.run.plan import print_plan

        print_plan(recipe, command.dry_run)
        return 0
    from train.loop import Trainer
    from train.ranks import parallel
    from train.ranks.faults import EXIT_RESUME
    from train.recipes import for_device
    from train.run.folder import run_folder
    from train.run.stages import finished

    stages = [recipe.stage1, recipe.stage2] if isinstance(recipe, TwoStages) else [recipe]
    world = parallel.start(stages[0].train, stages[0].parallel)
    try:
        stages = [for_device(stage, world.device.type) for stage in stages]
        for number, stage in enumerate(stages):
            if number + 1 < len(stages) and finished(stage):
                continue
            previous = run_folder(stages[number - 1]) if number else None
            outcome = Trainer(stage, world, stage=number, previous=previous, force=command.force).run()
            if not outcome.finished:
                break
    finally:
        parallel.finish()
    if world.is_main:
        print(report(outcome.finished, outcome.step, outcome.scores, outcome.grid, outcome.folder), flush=True)
    return 0 if outcome.finished else EXIT_RESUME


def report(finished: bool, step: int, scores: dict[str, float], grid: Path | None, folder: Path) -> str:
    """The last line of a run."""
    if not finished:
        return f"stopped at step {step}; the same command goes on from {folder}"
    parts = []
    if "combinations/all" in scores:
        named = {key.removeprefix("combinations/"): v for key, v in scores.items() if key.startswith("combinations/")}
        count = int(named.pop("count"))
        listed = ", ".join(f"{name} {value:.3f}" for name, value in named.items())
        parts.append(f"prompt accuracy on {count} prompts never trained on: {listed}")
        parts.append(f"on colour and shape pairs never trained on: all {scores['pairs/all']:.3f}")
    for name, value in scores.items():
        if name.startswith("ema/") and "/t=" not in name:
            parts.append(f"held-out {name.removeprefix('ema/')} {value:.4f}")
    parts.append(f"samples: {grid}" if grid else f"run: {folder}")
    return "; ".join(parts)


if __name__ == "__main__":
    exit_with_sentence(main)
