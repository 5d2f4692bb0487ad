"""What doctor.py says about data made here, with faults that it must find."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from train.commandline import DryRun
from train.doctor import Findings, Options, examine, render, take_options, wilson
from train.recipes import Recipe, prx_512
from train.run.hours import budget
from train.run.plan import flop_per_image, project

from .commands import run_program
from .data.picture_files import grey_tar, plain, sentence, write_parquet

ASSUMED = DryRun(enabled=True)


def recipe(path: Path, batch: int = 8) -> Recipe:
    made = prx_512()
    data = replace(made.data, path=str(path), height=128, width=128, workers=0)
    return replace(made, data=data, train=replace(made.train, batch=batch, steps=100))


def look(path: Path, sample: int | None = None, batch: int = 8) -> Findings:
    return examine(recipe(path, batch), ASSUMED, Options(sample))


def test_sound_data_have_their_counts_and_nothing_wrong(tmp_path: Path) -> None:
    pictures = [plain(n, (64, 64) if n < 20 else (60, 30)) for n in range(32)]
    write_parquet(tmp_path / "train.parquet", 32, image=pictures)
    write_parquet(tmp_path / "val.parquet", 3)
    found = look(tmp_path)
    assert found.wrong == []
    assert (found.values["samples"], found.values["validation"], found.values["epochs"]) == (32, 3, 25)
    assert [(b["height"], b["width"], b["pictures"], b["merged_into"]) for b in found.values["buckets"]] == [
        (128, 128, 20, None), (96, 160, 12, None),
    ]  # fmt: skip
    assert found.values["captions"]["bytes"] == {"p50": 7, "p90": 7, "p99": 7, "p100": 7}
    assert found.values["pictures"]["broken"] == 0
    assert "nothing found that would stop a run" in render(found)


def test_broken_pictures_shards_and_captions_are_found(tmp_path: Path) -> None:
    pictures = [plain(n, (64, 64)) for n in range(40)]
    pictures[3:9] = [b"no picture"] * 6
    captions = ["again", "again", "", *(f"grey {n}" for n in range(3, 40))]
    write_parquet(tmp_path / "train-0.parquet", 40, image=pictures, caption=captions)
    (tmp_path / "train-1.parquet").write_bytes(b"")
    found = look(tmp_path)
    text = "\n".join(found.wrong)
    assert "train-1.parquet is empty (0 bytes)" in text
    assert "7 of 40 pictures cannot be read (17.50% to 17.50% of all), more than data.bad_limit 0.01" in text
    assert "1 rows have no caption (first train-0.parquet row 2)" in text
    assert found.values["captions"]["repeated"] == 1
    assert any("no validation split" in note for note in found.advice)
    assert "WRONG: " in render(found)


def test_a_sample_gives_a_share_with_its_confidence(tmp_path: Path) -> None:
    pictures = [plain(n, (64, 64)) if n % 4 else b"no picture" for n in range(200)]
    write_parquet(tmp_path / "train.parquet", 200, image=pictures)
    pictures_found = look(tmp_path, sample=60).values["pictures"]
    low, high = pictures_found["broken_share_95_percent"]
    assert pictures_found["decoded"] == 60
    assert low < 0.25 < high
    assert wilson(0, 100) == pytest.approx((0.0, 0.03699), abs=1e-4)  # 1.96² / (100 + 1.96²)
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)


def test_small_buckets_and_too_few_samples_are_told_before_they_stop_a_run(tmp_path: Path) -> None:
    shapes = [(64, 64)] * 12 + [(60, 30)] * 3
    write_parquet(tmp_path / "train.parquet", 15, image=[plain(n, size) for n, size in enumerate(shapes)])
    found = look(tmp_path)
    assert found.values["buckets"][1]["merged_into"] == (128, 128)
    assert any("96x160 (3 pictures) into 128x128" in note for note in found.advice)
    assert any("the data have 15 samples, fewer than the 16" in sentence for sentence in look(tmp_path, batch=16).wrong)


def test_costs_are_the_mean_over_buckets(tmp_path: Path) -> None:
    made, sizes = recipe(tmp_path), {(128, 128): 30, (96, 160): 10}
    square, flat = (project(made, ASSUMED, {size: 1}) for size in sizes)
    both = project(made, ASSUMED, sizes)
    assert (square.tokens, flat.tokens, both.tokens) == (16, 15, 15.75)
    assert both.routed_flop == pytest.approx(0.75 * square.routed_flop + 0.25 * flat.routed_flop)
    assert both.activation_bytes == square.activation_bytes
    assert project(made, ASSUMED) == square
    assert flop_per_image(made, {(96, 160): 5}) < flop_per_image(made, sizes) < flop_per_image(made)
    assert flop_per_image(made, {(128, 128): 5}) == flop_per_image(made)


def test_long_opening_and_large_row_groups_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", 12)
    assert not any("index-cache" in note or "row groups" in note for note in look(tmp_path).advice)
    monkeypatch.setattr("train.doctor._LONG_OPENING", -1.0)
    monkeypatch.setattr("train.doctor._LARGE_GROUP", 10)
    notes = "\n".join(look(tmp_path).advice)
    assert "give --data.index-cache FOLDER, or columns width and height" in notes
    assert "parquet row groups have up to" in notes


def test_options_are_taken_out_of_the_words() -> None:
    words, options = take_options(["prx-512", "--sample", "7", "--json", "--data.path", "x"])
    assert (words, options) == (["prx-512", "--data.path", "x"], Options(7, True))
    assert take_options(["--sample=3", "--all"])[1] == Options(None, False)
    for wrong in ("0", "some", ""):
        assert "--sample takes a number" in sentence(lambda w=wrong: take_options([f"--sample={w}"]))  # type: ignore[misc]


def test_the_program_prints_json_and_its_code_says_whether_a_run_would_stop(tmp_path: Path) -> None:
    data = tmp_path / "data"
    grey_tar(data / "a.tar", 30, size=(64, 64))
    words = ["prx-512", "--data.path", str(data), "--train.batch", "8", "--gpus", "16", "--all", "--json"]
    done = run_program("doctor", *words)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert (values["samples"], values["cost"]["gpus"], values["wrong"]) == (30, 16, [])
    assert values["cost"]["hours"] > 0
    (data / "b.tar").write_bytes(b"")
    shutil.copy(data / "a.tar", data / "c.tar")
    done = run_program("doctor", *words[:-1])
    assert done.returncode == 1
    assert "WRONG: " in done.stdout
    assert "b.tar is empty (0 bytes)" in done.stdout
    assert "30 repeat another's pixels" in done.stdout


def test_the_program_leaves_with_a_sentence_where_there_is_nothing(tmp_path: Path) -> None:
    done = run_program("doctor", "prx-512", "--data.path", str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is nothing at ")
    assert "Traceback" not in done.stderr


def test_the_program_tells_of_enlarged_pictures_and_many_epochs(tmp_path: Path) -> None:
    """128 px pictures for 512 px, seen thousands of times; none where they are as large as they are trained at."""
    sizes = [(128, 128)] * 9 + [(512, 512)] * 3
    write_parquet(tmp_path / "train.parquet", 12, image=[plain(n, size) for n, size in enumerate(sizes)])
    done = run_program("doctor", "prx-512", "--data.path", str(tmp_path), "--train.batch", "4", "--gpus", "4", "--all")
    assert done.returncode == 0, done.stderr
    assert "75.0% of the pictures are smaller than they are trained at" in done.stdout
    assert "half of those 4.0 times a side or more, the smallest 4.0 times" in done.stdout
    assert "each picture would be seen 33,333 times" in done.stdout
    words = ["--data.height", "128", "--data.width", "128", "--train.steps", "30", "--train.batch", "4", "--all"]
    done = run_program("doctor", "prx-512", "--data.path", str(tmp_path), *words, "--gpus", "4")
    assert done.returncode == 0, done.stderr
    assert "enlarged" not in done.stdout
    assert "would be seen" not in done.stdout


def test_the_program_tells_memory_by_the_layout(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 1024, image=[plain(n % 2, (64, 64)) for n in range(1024)])
    words = ["prx-512", "--data.path", str(tmp_path), "--sample", "2"]
    told = run_program("doctor", *words).stdout
    assert "2.4 GB of weights, gradients, optimizer and EMA sharded over 8 (18.9 GB whole)" in told
    assert f"at the peak {budget('prx-512', 32)['peak GB']:.1f} GB a GPU, counted" in told
    told = run_program("doctor", *words, "--parallel.shard", "32").stdout
    whole = project(prx_512(), DryRun()).state_bytes
    assert f"{whole / 32 / 1e6:.1f} MB of weights, gradients, optimizer and EMA sharded over 32" in told
    assert "estimated: states, bf16 weights and activations, without teachers, NCCL's buffers" in told


def test_the_program_assumes_one_gpu_for_a_toy_and_tells_what_its_codes_mean() -> None:
    done = run_program("doctor", "shapes")
    assert done.returncode == 0, done.stderr
    assert "steps on 1 GPU: " in done.stdout
    assert "2 with a sentence for a mistake" in " ".join(run_program("doctor", "--help").stdout.split())
    done = run_program("doctor", "shapes", "--gpus", "many")
    assert (done.returncode, done.stderr) == (2, "error: --gpus takes a number, got 'many'\n")
