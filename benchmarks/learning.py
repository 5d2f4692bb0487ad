"""Who learns faster: AdamW, torch.optim.Muon and `prx_kernels.Muon`, dense and routed, several seeds each.

python -m benchmarks.learning shapes --steps 1000 --target 0.3 --seeds 0 1 2 --out OUT

Writes there learning.json; learning.md, with the losses at equal steps and what each needs to the target; learning.png,
the curves with their spread; samples.png, what each draws in the end, of the first seed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train import ablate, loop
from train.ablate import HELD_OUT, Point, Reached, reach, read
from train.commandline import parse
from train.errors import UserError, exit_with_sentence
from train.learner import step as training_step
from train.learner.optimizers import Named, Optimizers, split
from train.ranks import parallel
from train.ranks.working_copy import WorkingCopy
from train.recipes import Recipe
from train.run.folder import METRICS, SAMPLES, run_folder
from train.run.stages import finished


class TorchOptimizers(Optimizers):
    """torch.optim.Muon and torch.optim.AdamW with the settings of a recipe; states are not saved."""

    def __init__(self, parameters: Named, recipe: Recipe, *_: object) -> None:
        muon, adam = split(parameters, recipe)
        m, a = recipe.muon, recipe.adam
        self.both: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [parameter for _, parameter in muon],
                lr=m.lr,
                weight_decay=m.weight_decay,
                momentum=m.momentum,
                nesterov=m.nesterov,
                ns_coefficients=m.ns_coefficients,
                ns_steps=m.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW([p for _, p in adam], lr=a.lr, betas=a.betas, eps=a.eps, weight_decay=a.weight_decay),
        ]
        self.base_rates = [m.lr, a.lr]

    def step(self, factor: float, clip: float, copies: Sequence[WorkingCopy] = ()) -> Tensor:
        parameters = [p for optimizer in self.both for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:  # torch's optimizers want gradients in the dtype of the weights
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to(parameter.dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer, rate in zip(self.both, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def skipped(self) -> int:
        return 0

    def state_dict(self) -> dict[str, Tensor]:
        return {}


VARIANTS: dict[str, tuple[list[str], type[Optimizers]]] = {
    "AdamW": (["--no-muon"], Optimizers),
    "AdamW, routed": (["--no-muon", "--routing.enabled"], Optimizers),
    "torch.optim.Muon": ([], TorchOptimizers),
    "prx_kernels.Muon": ([], Optimizers),
    "prx_kernels.Muon, 4 steps": (["--muon.ns-steps", "4"], Optimizers),
    "prx_kernels.Muon, 4 steps, AOL": (["--muon.ns-steps", "4", "--muon.ns-preconditioner", "aol"], Optimizers),
    "prx_kernels.Muon, routed": (["--routing.enabled"], Optimizers),
}
"""By name: words of the command, and what updates the weights."""


def train(words: Sequence[str], kind: type[Optimizers]) -> tuple[Recipe, list[Point]]:
    """One run to its end, or what a finished one left; gives its held-out losses."""
    recipe = parse(words).recipe
    if not isinstance(recipe, Recipe):
        raise UserError("a learning curve is of one stage: take another preset")
    # Saved at the end only: the states of torch's optimizers are not kept.
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=recipe.train.steps))
    if not finished(recipe):
        world = parallel.start(recipe.train)
        try:
            with patch.object(training_step, "Optimizers", kind):
                loop.Trainer(recipe, world).run()
        finally:
            parallel.finish()
    return recipe, read(run_folder(recipe), recipe.train.batch, HELD_OUT, 1)


def summarise(curves: dict[str, dict[int, list[Point]]]) -> list[dict[str, Any]]:
    """A row a variant and step at which all seeds were measured: mean and sample deviation of the loss."""
    rows = []
    for name, by_seed in curves.items():
        found = [{point.step: point.loss for point in points} for points in by_seed.values()]
        for step in sorted(set.intersection(*(set(one) for one in found))):
            losses = [one[step] for one in found]
            spread = stdev(losses) if len(losses) > 1 else None
            rows.append(
                {"variant": name, "step": step, "loss": mean(losses), "deviation": spread, "seeds": len(losses)}
            )
    return rows


def table(rows: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """Markdown: a line a variant, a column a step; mean ± sample deviation."""
    lines = ["| held-out loss after | " + " | ".join(f"{step:,} steps" for step in steps) + " |"]
    lines.append("|---|" + "---|" * len(steps))
    by_place = {(row["variant"], row["step"]): row for row in rows}
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for step in steps:
            row = by_place[name, step]
            spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
            cells.append(f"{row['loss']:.3f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Curves of the means behind the first quarter of the steps, where all fall alike, with a band of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(6.0, 3.4), dpi=110)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name and 4 * row["step"] >= max(r["step"] for r in rows)]
        steps, losses = [row["step"] for row in own], [row["loss"] for row in own]
        (line,) = axes.plot(steps, losses, marker=".", label=name)
        spread = [row["deviation"] or 0.0 for row in own]
        lower, upper = ([x + sign * s for x, s in zip(losses, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="held-out loss (EMA)", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    drawn.tight_layout()
    drawn.savefig(path)
    pyplot.close(drawn)


def samples(drawn: dict[str, Path], path: Path) -> None:
    """The grids of all variants, as the runs have drawn them, side by side under their names."""
    grids = [Image.open(grid).convert("RGB") for grid in drawn.values()]
    line, gap, font = 20, 8, ImageFont.load_default(13)
    width = sum(grid.width + gap for grid in grids)
    whole = Image.new("RGB", (width, line + max(grid.height for grid in grids)), "white")
    pen, left = ImageDraw.Draw(whole), 0
    for name, grid in zip(drawn, grids, strict=True):
        pen.text((left + 4, 2), name, fill="black", font=font)
        whole.paste(grid, (left, line))
        left += grid.width + gap
    whole.save(path, optimize=True)


def to_target(curves: dict[str, dict[int, list[Point]]], target: float) -> list[ablate.Row]:
    """Steps and seconds of every variant to the first measured loss at or below the target."""
    return ablate.summarise(
        [
            Reached(name, seed, *reach(points, target), points[-1].loss)
            for name, by_seed in curves.items()
            for seed, points in by_seed.items()
        ]
    )


DRAWN = {"background": "background", "position": "position", "all": "everything"}
"""Parts of a prompt in the table, of those that the oracle reads in drawn pictures."""


def drawn_right(recipe: Recipe) -> dict[str, float]:
    """Shares of held-out prompts that a finished run draws right, by part; empty for data without an oracle."""
    lines = (run_folder(recipe) / METRICS).read_text().splitlines()
    found = {name: value for line in lines for name, value in json.loads(line).items()}
    return {part: found[name] for part in DRAWN if (name := f"eval/combinations/{part}") in found}


def drawn_table(shares: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line a variant, mean ± sample deviation over the seeds."""
    lines = ["| drawn right in the end | " + " | ".join(DRAWN.values()) + " |", "|---|" + "---|" * len(DRAWN)]
    for name, seeds in shares.items():
        cells = []
        for part in DRAWN:
            values = [seed[part] for seed in seeds]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.learning",
        description="Trains a preset by each optimizer, dense and routed, and compares their held-out losses.",
        epilog="Words behind -- go to every run. Finished runs are not repeated.",
    )
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser.add_argument("preset", nargs="?", default="shapes")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--target", type=float, required=True, help="held-out loss to reach")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of what is found")
    asked, common = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    curves: dict[str, dict[int, list[Point]]] = {}
    drawn: dict[str, Path] = {}
    shares: dict[str, list[dict[str, float]]] = {}
    for seed in asked.seeds:
        for name in asked.variant:
            extra, kind = VARIANTS[name]
            words = [asked.preset, "--train.steps", str(asked.steps), "--evaluation.every", str(asked.every), *common]
            words += [*extra, "--train.seed", str(seed), "--output.folder", str(asked.out)]
            recipe, points = train([*words, "--output.name", f"{name}/seed-{seed}"], kind)
            curves.setdefault(name, {})[seed] = points
            if found_right := drawn_right(recipe):
                shares.setdefault(name, []).append(found_right)
            if seed == asked.seeds[0]:
                drawn[name] = run_folder(recipe) / SAMPLES / f"step-{asked.steps:08d}.png"
    rows, reached = summarise(curves), to_target(curves, asked.target)
    shown = [row["step"] for row in rows if row["variant"] == asked.variant[0]]
    shown = shown[len(shown) // 4 - 1 :: len(shown) // 4] if len(shown) >= 4 else shown
    printed = f"{table(rows, shown)}\n\n{ablate.table(reached, HELD_OUT, asked.target)}"
    printed += f"\n\n{drawn_table(shares)}" if shares else ""
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"device": recipe.train.device, "torch": torch.__version__}
    found = {"preset": asked.preset, "words": common, "steps": asked.steps, "machine": machine, "rows": rows}
    found |= {"target": asked.target, "to_target": [ablate.plain(row) for row in reached], "drawn_right": shares}
    (asked.out / "learning.json").write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "learning.md").write_text(printed + "\n")
    figure(rows, f"{asked.preset}, {len(asked.seeds)} seeds", asked.out / "learning.png")
    samples(drawn, asked.out / "samples.png")
    print(f"\n{printed}")
    return 0


if __name__ == "__main__":
    exit_with_sentence(main)
