"""`prx-24h` with one command at a tiny size: every ingredient of the recipe on, REPA in the first stage only."""

import json
from pathlib import Path

import pytest
import torch

from tests.model.test_text import saved  # noqa: F401  (a fixture: a tiny T5Gemma in a folder)
from tests.train.commands import run_program
from tests.train.data.picture_files import write_parquet
from train.checkpoint import checkpointer as checkpoint

STAGE = {
    "model.hidden-size": "64", "model.num-heads": "2", "model.axes-dim": "16 16", "model.depth": "4",
    "model.bottleneck-size": "16", "text.max-tokens": "8", "routing.end": "2", "train.batch": "4", "train.steps": "2",
    "train.warmup": "1", "checkpoint.every": "1", "evaluation.every": "2", "evaluation.grid": "2",
    "evaluation.images": "2", "sampling.steps": "2", "data.workers": "0", "lpips.weights": "random",
    "pdino.weights": "random", "pdino.teacher": "vit_small_patch14_reg4_dinov2", "pdino.size": "28", "ema.every": "1",
}  # fmt: skip


def command(folder: Path, data: Path, text: Path, width: int) -> list[str]:
    words = ["prx-24h"]
    for stage, size in (("stage1", "64"), ("stage2", "128")):
        fields = STAGE | {
            "data.path": str(data), "data.height": size, "data.width": size, "text.name": str(text),
            "model.context-in-dim": str(width), "output.folder": str(folder),
        }  # fmt: skip
        for name, value in fields.items():
            words += [f"--{stage}.{name}", *value.split()]
    repa = {"weights": "random", "teacher": "vit_small_patch16_dinov3", "layer": "1"}
    return words + [word for name, value in repa.items() for word in (f"--stage1.repa.{name}", value)]


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_run_in_sequence_and_the_second_goes_on_from_the_first(
    tmp_path: Path,
    saved: tuple[Path, torch.nn.Module],  # noqa: F811
) -> None:
    text, encoder = saved
    data = tmp_path / "data"
    write_parquet(data / "train.parquet", 12)
    write_parquet(data / "val.parquet", 3, first=12)
    words = command(tmp_path / "runs", data, text, encoder.config.encoder.hidden_size)
    done = run_program("speedrun", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RANDOM weights, as asked" in done.stderr
    first, second = tmp_path / "runs/prx-24h/stage-1", tmp_path / "runs/prx-24h/stage-2"
    trained = [next(line for line in lines_of(run) if "train/loss" in line) for run in (first, second)]
    assert {"train/loss/flow", "train/loss/repa", "train/loss/lpips", "train/loss/pdino"} <= trained[0].keys()
    assert "train/loss/repa" not in trained[1]
    assert {"train/loss/lpips", "train/loss/pdino"} <= trained[1].keys()
    assert all(
        torch.isfinite(torch.tensor(list(line.values()))).all() for line in (*lines_of(first), *lines_of(second))
    )
    configs = [json.loads((run / "config.json").read_text()) for run in (first, second)]
    assert [c["data"]["height"] for c in configs] == [64, 128]
    assert [c["train"]["warmup"] for c in configs] == [1, 1]
    states = [
        json.loads((run / f"checkpoints/step-0000000{step}/state.json").read_text())
        for run, step in ((first, 2), (second, 1), (second, 2))
    ]
    assert [state["position"] for state in states] == [8, 12, 16]
    momentum = [
        checkpoint.load(run / f"checkpoints/step-0000000{step}", names=["optimizer"]).tensors["optimizer"]
        for run, step in ((first, 2), (second, 1))
    ]
    assert any(name.startswith("repa.") for name in momentum[0])
    assert momentum[1].keys() == {name for name in momentum[0] if not name.startswith("repa.")}
    # Adam's second moment decays by 0.05 a step: what was carried over is most of what is there after one more.
    name = next(n for n in momentum[1] if n.endswith("exp_avg_sq") and "final_layer" in n)
    assert momentum[1][name].sum() > 0.9 * momentum[0][name].sum()
    again = run_program("speedrun", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "stage-2 at step 2" in again.stdout
    assert "stage-1" not in again.stdout


def test_a_second_stage_of_another_model_is_refused_in_one_sentence(
    tmp_path: Path,
    saved: tuple[Path, torch.nn.Module],  # noqa: F811
) -> None:
    text, encoder = saved
    write_parquet(tmp_path / "data/train.parquet", 8)
    words = command(tmp_path / "runs", tmp_path / "data", text, encoder.config.encoder.hidden_size)
    words += ["--stage2.model.bottleneck-size", "32"]
    done = run_program("speedrun", *words)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "does not fit this stage" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flag", ["--stage1.train.steps", "--stage2.train.batch"])
def test_fields_of_both_stages_are_checked(flag: str) -> None:
    done = run_program("speedrun", "prx-24h", flag, "many")
    assert done.returncode == 2
    assert flag.removeprefix("--") in done.stderr
