"""The learning comparison: what it averages, what it trains by which optimizer, and what it leaves in its folder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from benchmarks.learning import TorchOptimizers, summarise, table, to_target
from tests.train.commands import ROOT, TINY
from train.ablate import Point
from train.learner.optimizers import Optimizers
from train.recipes import shapes


def test_only_steps_that_every_seed_reached_are_averaged() -> None:
    curves = {"a": {0: [Point(10, 1.0, 2.0), Point(20, 2.0, 1.0)], 1: [Point(10, 1.0, 4.0)]}}
    (row,) = summarise(curves)
    assert (row["step"], row["loss"], row["seeds"]) == (10, 3.0, 2)
    assert math.isclose(row["deviation"], math.sqrt(2.0))
    assert table([row], [10]).splitlines()[-1] == "| a | 3.000 ± 1.414 |"


def test_ours_and_torchs_optimizers_make_the_same_first_step() -> None:
    recipe = shapes()
    updated = []
    for kind in (Optimizers, TorchOptimizers):
        generator = torch.Generator().manual_seed(0)
        named = [
            (name, torch.nn.Parameter(torch.randn(shape, generator=generator)))
            for name, shape in (("model.blocks.0.w", (24, 16)), ("model.bias", (16,)))
        ]
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        kind(named, recipe).step(0.5, recipe.train.clip)
        updated.append([parameter.detach() for _, parameter in named])
        assert all(parameter.grad is None for _, parameter in named)
    # torch's Newton-Schulz rounds to bfloat16.
    torch.testing.assert_close(updated[0][0], updated[1][0], rtol=0, atol=3e-2 * recipe.muon.lr)
    torch.testing.assert_close(updated[0][1], updated[1][1])


def test_a_comparison_leaves_table_figure_and_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learning", "shapes", "--steps", "4", "--every", "2", "--seeds", "0"]
    command += [
        "--target",
        "1e9",
        "--variant",
        "torch.optim.Muon",
        "prx_kernels.Muon, routed",
        "--out",
        str(tmp_path),
        "--",
        *TINY[:-6],
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "learning.json").read_text())
    assert {(row["variant"], row["step"]) for row in found["rows"]} == {
        (name, step) for name in ("torch.optim.Muon", "prx_kernels.Muon, routed") for step in (2, 4)
    }
    assert (tmp_path / "learning.md").read_text().strip() in done.stdout
    assert [(row["reached"], row["steps"]["mean"]) for row in found["to_target"]] == [(1, 2.0), (1, 2.0)]
    for shares in found["drawn_right"].values():
        assert [set(seed) for seed in shares] == [{"background", "position", "all"}]
    assert "| prx_kernels.Muon, routed |" in (tmp_path / "learning.md").read_text().split("drawn right")[1]
    for routed, name in ((False, "torch.optim.Muon"), (True, "prx_kernels.Muon, routed")):
        config = json.loads((tmp_path / name / "seed-0" / "config.json").read_text())
        assert config["routing"]["enabled"] is routed
    assert (tmp_path / "learning.png").stat().st_size > 1000
    with Image.open(tmp_path / "samples.png") as both:
        grids = [
            Image.open(tmp_path / row["variant"] / "seed-0/samples/step-00000004.png") for row in found["to_target"]
        ]
        assert both.width >= sum(grid.width for grid in grids)


def test_a_target_is_reached_at_the_first_measurement_below_it_or_never() -> None:
    curves = {"a": {0: [Point(10, 1.0, 2.0), Point(20, 2.0, 1.0)], 1: [Point(10, 1.0, 4.0)]}}
    (row,) = to_target(curves, 1.5)
    assert (row.runs, row.reached, row.steps[0], row.seconds[0]) == (2, 1, 20.0, 2.0)
    (row,) = to_target(curves, 0.5)
    assert (row.reached, row.steps) == (0, None)
