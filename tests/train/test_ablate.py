"""Time to a target loss: the arithmetic on known curves, and two tiny variants from command to table."""

import json
import math
import sys
from pathlib import Path

import pytest

from tests.train.commands import TINY
from train.ablate import HELD_OUT, TRAIN, Point, Reached, curve, main, reach, read, summarise, table, variant
from train.checkpoint import checkpointer as checkpoint
from train.commandline import parse
from train.errors import UserError
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import Recipe

EVERYTHING = [
    *TINY, "--data.height", "64", "--data.width", "64", "--train.steps", "1", "--train.batch", "2",
    "--train.device", "cpu", "--routing.enabled", "--routing.start", "1",
    "--repa.enabled", "--repa.teacher", "vit_small_patch16_dinov3", "--repa.weights", "random", "--repa.layer", "1",
    "--lpips.enabled", "--lpips.network", "squeeze", "--lpips.weights", "random",
    "--pdino.enabled", "--pdino.teacher", "vit_small_patch14_reg4_dinov2", "--pdino.weights", "random",
    "--pdino.size", "28", "--evaluation.images", "2", "--evaluation.prompts", "2", "--evaluation.grid", "1",
]  # fmt: skip
"""Every ingredient of the recipe, on `shapes`."""


@pytest.mark.parametrize("left_out", ["", "routing", "repa", "lpips", "pdino", "muon"])
@pytest.mark.filterwarnings("ignore:.*RANDOM weights")
def test_a_run_without_one_ingredient_has_all_the_others(left_out: str, tmp_path: Path) -> None:
    words = ["shapes", *EVERYTHING, "--output.folder", str(tmp_path)] + ([f"--no-{left_out}"] if left_out else [])
    recipe = parse(words).recipe
    assert isinstance(recipe, Recipe)
    assert Trainer(recipe, parallel.start(recipe.train)).run().finished
    lines = [json.loads(line) for line in (tmp_path / "shapes/metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "train/loss" in line)
    assert {"repa", "lpips", "pdino"} - {left_out} == {
        name.removeprefix("train/loss/") for name in logged if name.startswith("train/loss/")
    } - {"flow"}
    assert math.isfinite(logged["train/loss"])
    state = checkpoint.load(checkpoint.complete(tmp_path / "shapes")[-1]).tensors["optimizer"]
    # Adam has two moments of a block's matrix, Muon one.
    moments = [name for name in state if name.startswith("model.blocks.0.") and name.count("img_qkv_proj")]
    assert len(moments) == 1 if left_out != "muon" else len(moments) > 1, moments


def train_line(step: int, loss: float, rate: float, **others: float) -> dict[str, float]:
    return {"step": step, "time": 0.0, "train/loss": loss, "speed/images_per_second": rate, **others}


LINES = [
    train_line(10, 4.0, 40.0),  # 10 steps of 8 pictures at 40 a second: 2 s
    train_line(20, 2.0, 80.0),  # 1 s
    {"step": 20, "time": 0.0, "eval/ema/loss/32x32": 1.5, "eval/ema/loss/32x32/t=0.1": 9.0, "eval/raw/loss/32x32": 8.0},
    train_line(30, 1.0, 80.0),
    train_line(36, 0.5, 48.0),  # 6 steps: 1 s
    {"step": 36, "time": 0.0, "eval/ema/loss/32x32": 1.25, "eval/combinations/all": 0.5},
]


def test_seconds_are_those_of_training_and_the_loss_is_a_trailing_mean_over_the_window() -> None:
    assert curve(LINES, 8, TRAIN, 20) == [
        Point(20, 3.0, 3.0),
        Point(30, 4.0, 1.5),
        # The window of 20 needs the last three lines: 26 steps.
        Point(36, 5.0, pytest.approx((10 * 2.0 + 10 * 1.0 + 6 * 0.5) / 26)),
    ]
    assert [point.loss for point in curve(LINES, 8, TRAIN, 1)] == [4.0, 2.0, 1.0, 0.5]
    assert curve(LINES, 8, TRAIN, 37) == []


def test_a_held_out_loss_is_that_of_the_averaged_weights_over_all_times() -> None:
    assert curve(LINES, 8, HELD_OUT, 100) == [Point(20, 3.0, 1.5), Point(36, 5.0, 1.25)]
    two = [train_line(10, 1.0, 8.0), {"step": 10, "eval/ema/loss/32x32": 1.0, "eval/ema/loss/32x48": 2.0}]
    assert curve(two, 8, HELD_OUT, 100) == [Point(10, 10.0, 1.5)]


def test_teachers_do_not_count_in_the_training_loss() -> None:
    lines = [train_line(10, 4.0, 8.0, **{"train/loss/flow": 3.0, "train/loss/lpips": 10.0})]
    assert curve(lines, 8, TRAIN, 10)[0].loss == 3.0


def test_a_target_is_reached_at_the_first_point_not_above_it() -> None:
    points = [Point(10, 1.0, 3.0), Point(20, 2.0, 2.0), Point(30, 3.0, 2.5)]
    assert reach(points, 2.0) == (20, 2.0)
    assert reach(points, 1.9) == (None, None)


def test_the_table_has_mean_and_sample_deviation_of_the_seeds_that_reached_it() -> None:
    runs = [
        Reached("base", 0, 100, 10.0, 0.25), Reached("base", 1, 120, 13.0, 0.5), Reached("base", 2, None, None, 0.75),
        Reached("slow", 0, None, None, 0.75), Reached("slow", 1, None, None, 0.75),
        Reached("one", 0, 90, 9.5, 0.125),
    ]  # fmt: skip
    rows = summarise(runs)
    assert rows[0].steps == (110.0, pytest.approx(math.sqrt(200)))
    assert rows[0].seconds == (11.5, pytest.approx(math.sqrt(4.5)))
    assert table(rows, HELD_OUT, 0.6).splitlines() == [
        "| variant | seeds that reached held-out loss 0.6 | steps | seconds | last held-out loss |",
        "|---|---|---|---|---|",
        "| base | 2 of 3 | 110 ± 14 | 11.5 ± 2.1 | 0.5000 ± 0.2500 |",
        "| slow | 0 of 2 | never | never | 0.7500 ± 0.0000 |",
        "| one | 1 of 1 | 90 | 9.5 | 0.1250 |",
    ]


def test_variants_are_a_name_and_words() -> None:
    assert variant("base").words == ()
    assert variant("no muon: --no-muon --adam.lr 1e-3").words == ("--no-muon", "--adam.lr", "1e-3")
    assert variant("mine: --data.path 'my pictures'").words == ("--data.path", "my pictures")
    with pytest.raises(UserError, match='the words of --variant "a: \'b" cannot be read: No closing quotation'):
        variant("a: 'b")
    for text in ("", ": --no-muon", "a/b", "--no-muon", ".."):
        with pytest.raises(UserError, match="--variant takes 'name' or 'name: --field value'"):
            variant(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "base", "--variant", "base"], "--variant names something twice: base, base"),
        (["--variant", "base", "--seeds", "1", "1"], "--seeds names something twice: 1, 1"),
        (["--variant", "base", "--variant", "bad: --no-rooting"], "unknown field --no-rooting; did you mean 'no-rout"),
        (["prx-24h", "--variant", "base"], "prx-24h has two stages, and a target loss belongs to one"),
    ],
)
def test_wrong_words_are_one_sentence_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--target", "1", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(UserError, match=message):
        main()
    assert not (tmp_path / "out").exists()


def test_metrics_that_hold_no_such_loss_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as the metrics of a run"):
        read(tmp_path, 8, TRAIN, 10)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    with pytest.raises(UserError, match="holds no train loss: set a smaller --window or more --train.steps"):
        read(tmp_path, 8, TRAIN, 11)
    with pytest.raises(UserError, match="holds no held-out loss"):
        read(tmp_path, 8, HELD_OUT, 10)


def test_two_variants_run_from_command_to_table_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ablate(target: str) -> str:
        words = ["shapes", "--target", target, "--out", str(tmp_path), "--seeds", "0", "--metric", "train"]
        words += ["--window", "10", "--variant", "base", "--variant", "adam: --no-muon", "--", *TINY]
        monkeypatch.setattr(sys, "argv", ["ablate.py", *words, "--train.steps", "20", "--evaluation.images", "8"])
        assert main() == 0
        return capsys.readouterr().out

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = ablate("1e9")
    for name in ("base", "adam"):
        recipe = json.loads((tmp_path / name / "seed-0/config.json").read_text())
        assert recipe["muon"]["enabled"] == (name == "base")
        assert f"{tmp_path / name / 'seed-0'}: training" in first
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["steps"] for row in found["rows"]] == [{"mean": 10.0, "deviation": None}] * 2
    assert (tmp_path / "ablation.md").read_text() == first[first.index("| variant") :]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-0/metrics.jsonl")}
    again = ablate("0")
    assert again.count("finished before") == 2
    assert "| adam | 0 of 1 | never | never |" in again
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(("lost", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_variant_that_diverged_is_a_row_and_the_others_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: float, shown: str
) -> None:
    lasts = iter([0.25, 0.5, lost, 0.25])
    monkeypatch.setattr("train.ablate.train_one", lambda words, recipe, ranks: None)
    monkeypatch.setattr("train.ablate.read", lambda *_: [Point(10, 1.0, 1.0), Point(20, 2.0, next(lasts))])
    words = ["shapes", "--target", "0.3", "--seeds", "0", "1", "--out", str(tmp_path), "--variant", "base"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *words, "--variant", "wild: --muon.lr 9"])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| base | 1 of 2 | 20 | 2.0 | 0.3750 ± 0.1768 |",
        f"| wild | 1 of 2 | 20 | 2.0 | {shown} |",
    ]
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert found["runs"][2]["last"] is None
    assert found["rows"][1]["last"] == {"mean": None, "deviation": None}


def test_a_run_that_fails_stops_the_rest_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.ablate._wait", lambda words: 2)
    words = ["shapes", "--target", "1", "--out", str(tmp_path), "--variant", "base"]
    monkeypatch.setattr(sys, "argv", ["ablate.py", *words])
    with pytest.raises(UserError, match="failed with code 2; the same command goes on with the rest"):
        main()
