"""Whole compiled runs from the command line, with Inductor, over buckets, routing, dropped captions and evaluations."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from .commands import TINY, run_program
from .data.picture_files import plain, write_parquet

SHAPES = [(64, 64), (60, 30), (30, 60), (64, 60), (40, 80), (80, 40), (60, 64), (128, 64)]
RUNS = {
    "micro-batches of two, half of the captions dropped": (
        "--train.batch 4 --parallel.micro-batches 2 --flow.caption-drop 0.5"
    ),
    "one picture a step": "--train.batch 1 --flow.caption-drop 0.5",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three buckets with captions of many lengths; one picture alone in a bucket of the validation split."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, sizes in (("train", SHAPES * 6), ("val", [*SHAPES[:1] * 5, *SHAPES[1:3]])):
        lengths = random.Random(0)
        captions = ["grey " + "x" * lengths.randrange(50) for _ in sizes]
        images = [plain(number, size) for number, size in enumerate(sizes)]
        write_parquet(folder / f"{name}.parquet", len(sizes), caption=captions, image=images)
    return folder


@pytest.mark.timeout(600)  # each makes code for eight graphs: a minute on a core of its own
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_compiled_run_ends_within_its_graphs(pictures: Path, tmp_path: Path, settings: str) -> None:
    arguments = [
        *TINY,
        *("--data.path", str(pictures), "--data.image-column", "image", "--data.style-column", ""),
        *("--data.height", "32", "--data.width", "32", "--data.workers", "0", "--data.buckets"),
        *("--routing.enabled", "--compile.enabled", "yes", "--train.steps", "24", "--evaluation.every", "12"),
        *("--output.folder", str(tmp_path), "--output.name", "run", *settings.split()),
    ]
    done = run_program("speedrun", "pictograms", *arguments, timeout=580, TORCH_LOGS="recompiles")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if any("ema/loss" in name for name in line)]
    assert len(scores) == 2
    assert {name for name in scores[-1] if name.count("/") == 3 and "ema" in name} >= {
        f"eval/ema/loss/{size}" for size in ("32x32", "24x40", "40x24")
    }
    assert "more graphs" not in done.stderr
    # The first graph of all is no recompilation: two own sizes, two and two others, two of evaluation.
    assert done.stderr.count("Recompiling function block") <= 7
    assert "Recompiling function block" in done.stderr
