"""What goes wrong in one rank of two: the run goes on as if nothing had been, or all ranks stop and say why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.commands import ROOT, TINY
from train.checkpoint import checkpointer as checkpoint
from train.ranks.faults import EXIT_RESUME

STEPS = 12


def run(folder: Path, fault: str, *words: str, restarts: int = 0, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Two ranks of `speedrun.py` with a fault; "none@9:0" for none."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command += [str(ROOT / "tests/train/ranks/fault_run.py"), fault]
    command += ["shapes", *TINY, "--routing.enabled", "--train.steps", str(STEPS), "--checkpoint.every", "4"]
    command += ["--checkpoint.keep", "9", "--evaluation.images", "4", "--output.folder", str(folder), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


def saved(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    found = checkpoint.load(folder / f"shapes/checkpoints/step-{step:08d}").tensors
    return {f"{part}/{name}": value for part, content in found.items() for name, value in content.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    odd = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not odd, f"{len(odd)} of {len(wanted)} tensors differ: {odd[:3]}"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    done = run(folder, "none@9:0")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("fault", ["sigterm@1:5", "sigusr1@1:5"])
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_bitwise(clean: Path, tmp_path: Path, fault: str) -> None:
    stopped = run(tmp_path, fault)
    assert stopped.returncode != 0
    assert f"exitcode  : {EXIT_RESUME}" in stopped.stderr, stopped.stderr[-3000:]
    assert "stopped at step 6; the same command goes on" in stopped.stdout
    assert (tmp_path / "shapes/latest").read_text().strip() == "checkpoints/step-00000006"
    done = run(tmp_path, "none@9:0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(saved(tmp_path), saved(clean))


def test_stopped_twice_in_a_row_it_still_ends_bitwise_the_same(clean: Path, tmp_path: Path) -> None:
    for step in (3, 7):
        stopped = run(tmp_path, f"sigterm@0:{step}")
        assert f"stopped at step {step + 1};" in stopped.stdout, stopped.stderr[-3000:]
    assert run(tmp_path, "none@9:0").returncode == 0
    assert_same(saved(tmp_path), saved(clean))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_more_or_fewer_ranks(clean: Path, tmp_path: Path, before: int, after: int) -> None:
    run(tmp_path, "sigterm@0:4", ranks=before)
    done = run(tmp_path, "none@9:0", ranks=after)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 5" in done.stdout
    losses = [
        [line["train/loss"] for line in map(json.loads, (folder / "shapes/metrics.jsonl").read_text().splitlines())
         if line["step"] == STEPS and "train/loss" in line]
        for folder in (tmp_path, clean)
    ]  # fmt: skip
    # Steps 11 and 12, after which the order of sums is all that differs.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    states = [
        json.loads((folder / f"shapes/checkpoints/step-{STEPS:08d}/state.json").read_text())
        for folder in (tmp_path, clean)
    ]
    assert states[0]["position"] == states[1]["position"] == STEPS * 8


def test_a_signal_to_one_rank_during_evaluation_stops_all(clean: Path, tmp_path: Path) -> None:
    stopped = run(tmp_path, "sigusr1-drawing@1:0", "--evaluation.every", "6")
    assert f"exitcode  : {EXIT_RESUME}" in stopped.stderr, stopped.stderr[-3000:]
    assert "stopped at step 6" in stopped.stdout
    done = run(tmp_path, "none@9:0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(saved(tmp_path), saved(clean))


def test_when_a_rank_dies_torchrun_goes_on_from_the_last_checkpoint(clean: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "die@1:6", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on with" in done.stdout
    assert "at step 4" in done.stdout
    assert_same(saved(tmp_path), saved(clean))


def test_when_a_rank_dies_while_it_saves_torchrun_goes_on_from_what_was_saved_before(
    clean: Path, tmp_path: Path
) -> None:
    done = run(tmp_path, "die-saving@1:8", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "at step 4" in done.stdout
    assert_same(saved(tmp_path), saved(clean))


def test_when_a_rank_hangs_all_print_their_stacks_and_torchrun_goes_on(clean: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "hang@1:6", "--parallel.timeout", "20", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Timeout (0:00:20)!" in done.stderr
    assert "in hang" in done.stderr, "the stack of the rank that hangs says where"
    assert "at step 4" in done.stdout
    assert_same(saved(tmp_path), saved(clean))


def test_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "nan@1:6", "--checkpoint.every", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(saved(tmp_path, 7), saved(tmp_path, 6))
    assert not torch.equal(
        saved(tmp_path, 8)["model/final_layer.linear.weight"], saved(tmp_path, 7)["model/final_layer.linear.weight"]
    )
    lines = [json.loads(line) for line in (tmp_path / "shapes/metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line] == [1, 1]


def test_nan_in_every_step_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    done = run(tmp_path, "nan-from@1:2", "--train.max-skipped", "4")
    assert done.returncode != 0
    assert "error: the gradient of the last 4 steps was not finite" in done.stderr, done.stderr[-3000:]
    # Steps 2 to 5 of 8 pictures: rank 1 has the last four of each, and every third position is bad.
    assert "(position 21, step 2)" in done.stderr
    assert "(position 45, step 5)" in done.stderr
    assert "exitcode  : 2" in done.stderr
