"""Whole runs at a tiny size: the folder they write, stopping and going on, several ranks, damaged checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.damage import reseal
from tests.train.commands import ROOT, TINY, run_program
from train.checkpoint import checkpointer as checkpoint
from train.errors import UserError
from train.ranks.faults import EXIT_RESUME
from train.run.folder import read_config


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as "file/name"."""
    saved = checkpoint.load(run / "checkpoints" / f"step-{step:08d}")
    return {f"{section}/{name}": t for section, content in saved.tensors.items() for name, t in content.items()}


def start(folder: Path, *extra: str, preset: str = "shapes") -> subprocess.CompletedProcess[str]:
    return run_program("speedrun", preset, *TINY, "--output.folder", str(folder), *extra)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps in one go, with checkpoints at 6 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(folder, "--train.steps", "12", "--checkpoint.every", "6", "--routing.enabled")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("shapes: ")
    assert "parameters on CPU in float32; shapes drawn on the fly of 32x32, batch 8, 12 steps" in first
    assert f"tensorboard --logdir {folder}" in first
    last = done.stdout.strip().splitlines()[-1]
    assert "prompt accuracy on 8 prompts never trained on: colour" in last
    assert last.endswith("samples/step-00000012.png")
    return folder / "shapes"


def test_drawing_on_a_cpu_imports_neither_dynamo_nor_what_it_brings(whole: Path, tmp_path: Path) -> None:
    """Six of thirteen seconds went by before anything was drawn."""
    program = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "diffusers", "transformers", "timm"} & sys.modules.keys()))
"""
    picture = tmp_path / "picture.png"
    words = [str(ROOT / "train/generate.py"), str(whole), "a red circle", "--out", str(picture), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert picture.is_file()


def test_a_run_writes_the_folder_of_the_design(whole: Path) -> None:
    assert json.loads((whole / "config.json").read_text())["train"]["steps"] == 12
    assert (whole / "latest").read_text().strip() == "checkpoints/step-00000012"
    assert (whole / "checkpoints/step-00000012/COMPLETE").exists()
    assert (whole / "samples/step-00000012.png").exists()
    assert list(whole.glob("events.out.tfevents*"))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 12, 12]
    assert {"train/loss", "speed/images_per_second"} <= lines[0].keys()
    assert 0 <= lines[-1]["eval/combinations/all"] <= 1


def test_config_is_read_back_as_it_was(whole: Path) -> None:
    recipe = read_config(whole)
    assert recipe.preset == "shapes"
    assert recipe.model.axes_dim == (16, 16)
    assert recipe.adam.betas == (0.9, 0.95)


def test_a_stopped_run_goes_on_bitwise(whole: Path, tmp_path: Path) -> None:
    """SIGTERM after some steps, then the same command: weights, EMA and optimizer equal the uninterrupted run's."""
    command = [sys.executable, str(ROOT / "train/speedrun.py"), "shapes", *TINY, "--output.folder", str(tmp_path)]
    command += ["--train.steps", "12", "--checkpoint.every", "1", "--checkpoint.keep", "20", "--routing.enabled"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while not (tmp_path / "shapes/checkpoints/step-00000003").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_RESUME
    assert "the same command goes on from" in output
    reached = checkpoint.complete(tmp_path / "shapes")[-1].name
    assert reached < "step-00000012"
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"at step {int(reached[-8:])}" in again.stdout
    assert_same(tensors(whole, 12), tensors(tmp_path / "shapes", 12))


def test_a_finished_run_started_again_only_reports(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "shapes")
    done = start(tmp_path, "--train.steps", "12", "--checkpoint.every", "6", "--routing.enabled")
    assert done.returncode == 0, done.stderr
    finished, last = done.stdout.strip().splitlines()
    assert finished.startswith(f"{tmp_path / 'shapes'} at step 12 is finished: nothing is trained or written again")
    assert last.startswith("prompt accuracy on 8 prompts")
    assert last.endswith("samples/step-00000012.png")
    files = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    copied = tmp_path / "shapes"
    assert files == {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()}


@pytest.mark.parametrize("content", ["", "[" * 100_000, '{"step": 11, "scores": {}, "grid": null}', '{"step": 12}'])
def test_an_end_that_is_damaged_or_another_s_is_evaluated_anew(whole: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(whole, tmp_path / "shapes")
    kept = (whole / "end.json").read_text()
    (tmp_path / "shapes/end.json").write_text(content)
    done = start(tmp_path, "--train.steps", "12", "--checkpoint.every", "6", "--routing.enabled")
    assert done.returncode == 0, done.stderr
    assert "is finished" not in done.stdout
    assert (tmp_path / "shapes/end.json").read_text() == kept
    assert_same(tensors(whole, 12), tensors(tmp_path / "shapes", 12))


def test_evaluations_on_the_way_say_what_they_found(tmp_path: Path) -> None:
    done = start(tmp_path, "--train.steps", "4", "--evaluation.every", "2", "--evaluation.raw", "loss")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("step 2: "))
    assert "ema/loss/32x32 " in line
    assert "raw/loss/32x32 " in line
    assert line.endswith(f"samples: {tmp_path / 'shapes/samples/step-00000002.png'}")


def test_drawing_at_another_size_than_was_trained_says_so(whole: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "picture.png")
    told = "this model was trained on pictures of 32x32 (height x width); pictures of 16x48 are often worse"
    done = run_program("generate", str(whole), "a red circle", "--out", out, "--height", "16", "--width", "48")
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    same = run_program("generate", str(whole), "a red circle", "--out", out, "--height", "32")
    assert "trained on" not in same.stdout


def test_other_settings_in_the_same_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "shapes")
    before = (tmp_path / "shapes/config.json").read_bytes()
    done = start(tmp_path, "--train.steps", "12", "--train.seed", "5", "--routing.enabled")
    assert done.returncode == 2
    assert "train.seed 0 -> 5" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "shapes/config.json").read_bytes() == before


def test_two_ranks_train_on_the_same_samples_as_one(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train/speedrun.py"), "shapes", *TINY, "--output.folder", str(tmp_path)]
    command += ["--train.steps", "12", "--checkpoint.every", "6", "--routing.enabled"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, tmp_path / "shapes")
    )
    # The mean of ten steps' losses; ranks differ in the order of float32 sums, grown over ten steps of Muon in bf16.
    one, two = (
        tensors(whole, 6)["model/final_layer.linear.weight"],
        tensors(tmp_path / "shapes", 6)["model/final_layer.linear.weight"],
    )
    assert (one - two).norm() < 0.05 * one.norm()
    assert first[0]["step"] == second[0]["step"] == 10
    assert second[0]["train/loss"] == pytest.approx(first[0]["train/loss"], rel=0.01)


def test_scenes_and_image_presets_train(tmp_path: Path, picture_folder: Path) -> None:
    small = ("--train.steps", "3", "--data.workers", "0")
    assert start(tmp_path, *small, "--data.height", "32", "--data.width", "48", preset="scenes").returncode == 0
    images = ("--data.path", str(picture_folder), "--data.height", "16", "--data.width", "24")
    columns = ("--data.style-column", "", "--data.image-column", "image")
    done = start(tmp_path, *small, *images, *columns, preset="pictograms")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout.strip().splitlines()[-1]


def test_pictograms_train_and_draw_validation_captions(tmp_path: Path, pictograms: Path) -> None:
    done = start(
        tmp_path, "--train.steps", "3", "--data.path", str(pictograms), "--evaluation.images", "16", preset="pictograms"
    )
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert (tmp_path / "pictograms/samples/step-00000003.png").exists()


def test_other_data_on_resume_are_refused(tmp_path: Path, picture_folder: Path) -> None:
    images = ("--data.height", "16", "--data.width", "16", "--data.style-column", "", "--data.image-column", "image")
    small = ("--train.steps", "2", "--data.workers", "0", *images)
    assert start(tmp_path / "runs", *small, "--data.path", str(picture_folder), preset="pictograms").returncode == 0
    other = tmp_path / "other"
    shutil.copytree(picture_folder, other)
    lines = (other / "train/captions.jsonl").read_text().splitlines()
    (other / "train/captions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    done = start(tmp_path / "runs", *small, "--data.path", str(other), preset="pictograms")
    assert done.returncode == 2
    assert "are not those that" in done.stderr
    more = ("--data.path", str(other), "--force", "--train.steps", "3")
    forced = start(tmp_path / "runs", *small, *more, preset="pictograms")
    assert forced.returncode == 0, forced.stderr
    assert "are not those that" in forced.stdout
    assert "going on with" in forced.stdout


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_picture_is_one_sentence(tmp_path: Path, picture_folder: Path, workers: str) -> None:
    broken = tmp_path / "data"
    shutil.copytree(picture_folder, broken)
    for picture in (broken / "train").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:60])
    images = ("--data.height", "16", "--data.width", "16", "--data.style-column", "", "--data.image-column", "image")
    where = ("--data.path", str(broken), "--data.workers", workers, "--train.steps", "2")
    done = start(tmp_path / "runs", *where, *images, preset="pictograms")
    assert done.returncode == 2
    assert ".png" in done.stderr
    assert done.stderr.count("\n") == 1


def test_weights_of_another_model_are_refused(whole: Path, tmp_path: Path) -> None:
    from train.run.trained import load_trained

    folder = tmp_path / "step-00000012"
    shutil.copytree(whole / "checkpoints/step-00000012", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    with pytest.raises(UserError, match="do not fit the model of its config.json"):
        load_trained(folder, torch.device("cpu"))


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with captions: twelve pictures to train on, four to validate."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("val", 4)):
        (root / split).mkdir()
        with (root / split / "captions.jsonl").open("w") as file:
            for i in range(count):
                Image.new("RGB", (40, 30), (20 * i, 100, 255 - 20 * i)).save(root / split / f"{i}.png")
                file.write(json.dumps({"file_name": f"{i}.png", "caption": f"picture {split} {i}"}) + "\n")
    return root
