"""Divergence eats no good checkpoint, and names the right culprits."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.commands import TINY, run_program
from tests.train.data.picture_files import write_parquet
from train.checkpoint import files, finite, storage
from train.checkpoint.checkpointer import Checkpointer, find_newest, load
from train.commandline import parse
from train.errors import EXIT_BAD_INPUT, UserError
from train.learner.step import Learner, StepResult
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import Recipe
from train.run.folder import read_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WILD = [*TINY, "--adam.lr", "1e38", "--checkpoint.every", "3", "--checkpoint.keep", "2"]


def recipe_of(folder: Path, *words: str, preset: str = "shapes") -> Recipe:
    recipe = parse([preset, *TINY, "--train.device", "cpu", "--output.folder", str(folder), *words]).recipe
    assert isinstance(recipe, Recipe)
    return recipe


def train(recipe: Recipe) -> Path:
    return Trainer(recipe, parallel.start(recipe.train)).run().folder


# --- the numbers themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen_in_every_dtype(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(3, 5)
    assert finite.is_finite(values.to(dtype))
    values[2, 4] = bad
    assert not finite.is_finite(values.to(dtype))


def test_whole_numbers_nothing_and_the_largest_float_are_finite() -> None:
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    assert all(map(finite.is_finite, (torch.arange(3), torch.tensor(True), torch.empty(0), largest, -largest)))


# --- saves --------------------------------------------------------------------------------------------------------


def saver(run: Path) -> Checkpointer:
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    return Checkpointer(run, keep=1)


@pytest.mark.parametrize("section", ["model", "ema", "optimizer"])
def test_a_save_that_is_not_finite_is_named_and_the_last_finite_one_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str
) -> None:
    checkpointer = saver(tmp_path)
    good = {name: {"w": torch.ones(4)} for name in ("model", "ema", "optimizer")}
    checkpointer.save(1, good, {}, wait=True)
    bad = {**good, section: {"w": torch.tensor([1.0, torch.nan])}}
    checkpointer.save(2, bad, {})
    with pytest.raises(UserError, match=f"after step 2 was not written: {section}/w holds numbers that are not finite"):
        checkpointer.save(3, good, {})
    checkpointer.close()
    assert f"warning: the checkpoint after step 2 was not written: {section}/w" in capsys.readouterr().out
    assert [folder.name for folder in files.complete(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("steps", ["9", "40"])
def test_divergence_eats_no_good_checkpoint_and_ends_the_run_with_an_error(tmp_path: Path, steps: str) -> None:
    """With NaN weights saved twice there was no way back, and a run of 9 steps ended as if all were well."""
    sane = ["--adam.lr", "1e-3", "--train.steps", "2", "--checkpoint.every", "1", "--checkpoint.keep", "2"]
    run = train(recipe_of(tmp_path, *sane))
    done = run_program("speedrun", "shapes", *WILD, "--train.steps", steps, "--output.folder", str(tmp_path), "--force")
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert "training has diverged" in done.stderr or "was not finite, so they were skipped" in done.stderr
    assert "Traceback" not in done.stderr
    left = files.complete(run)
    assert [folder.name for folder in left] == ["step-00000001", "step-00000002"]
    assert all(load(folder).step for folder in left)


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe_of(tmp_path_factory.mktemp("two"), "--train.steps", "2", "--checkpoint.every", "1"))


@pytest.fixture
def diverged(two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A run whose checkpoint after step 2 holds NaN in one section, with right hashes, as older versions wrote."""

    def make(section: str) -> Path:
        run = tmp_path / "shapes"
        shutil.copytree(two_steps, run)
        whole = load(files.step_folder(run, 2))
        next(iter(whole.tensors[section].values())).view(-1)[0] = torch.nan
        with monkeypatch.context() as patch:
            patch.setattr(storage, "is_finite", lambda tensor: True)
            checkpointer = Checkpointer(run, keep=2)
            facts = {name: value for name, value in whole.state.items() if name not in ("format", "step")}
            checkpointer.save(2, whole.tensors, facts, wait=True)
            checkpointer.close()
        return run

    return make


@pytest.mark.parametrize("section", ["model", "ema", "optimizer"])
def test_resume_names_a_checkpoint_that_is_not_finite_and_takes_the_one_before(
    diverged: Callable[[str], Path], capsys: pytest.CaptureFixture[str], section: str
) -> None:
    run = diverged(section)
    found = find_newest(run)
    assert found is not None
    assert found.step == 1
    printed = capsys.readouterr().out
    assert f"step-00000002/{section}.rank00000.safetensors holds numbers that are not finite (in " in printed
    with pytest.raises(UserError, match="not finite"):
        load(files.step_folder(run, 2))


def test_generate_and_export_refuse_weights_that_are_not_finite(
    diverged: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = files.step_folder(diverged("ema"), 2)
    drawn = run_program("generate", str(checkpoint), "a red circle", "--out", str(tmp_path / "picture.png"))
    written = run_program("export", str(checkpoint), "--out", str(tmp_path / "exported"))
    for done in (drawn, written):
        assert done.returncode == EXIT_BAD_INPUT
        assert "holds numbers that are not finite" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "picture.png").exists()
    assert not (tmp_path / "exported").exists()


# --- wrong culprits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [False, True])
def test_the_samples_named_after_skipped_steps_are_those_that_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: bool
) -> None:
    """They were looked up in another order of the data: 0 of 8 were right."""
    write_parquet(tmp_path / "data" / "train.parquet", 64)
    step = Learner.step
    bad: set[str] = set()

    def bad_step(self: Learner, batch: Any, number: int) -> StepResult:
        result = step(self, batch, number)
        wrong = torch.tensor([int(caption.split()[1]) % 5 == 0 for caption in batch.captions])
        bad.update(f"row {c.split()[1]}" for c in batch.captions if int(c.split()[1]) % 5 == 0)
        self.skipped.fill_(number + 1)
        return replace(result, losses=torch.where(wrong, torch.nan, result.losses))

    monkeypatch.setattr(Learner, "step", bad_step)
    words = [
        "--data.path",
        str(tmp_path / "data"),
        "--data.image-column",
        "image",
        "--data.style-column=",
        "--data.workers",
        "0",
    ]
    words += ["--data.buckets"] if buckets else []
    recipe = recipe_of(tmp_path, *words, "--train.steps", "9", "--train.max-skipped", "2", preset="pictograms")
    with pytest.raises(UserError, match="train.max_skipped is 2; samples with a loss that is not finite: ") as stopped:
        train(recipe)
    named = str(stopped.value).partition("not finite: ")[2].split(", train.parquet ")
    assert len(named) == len(bad) >= 2
    assert {part.removeprefix("train.parquet ").split(" (")[0] for part in named} == bad


def test_too_many_skipped_steps_are_seen_when_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the next reading of the loss, ten steps on."""
    seen: list[int] = []

    def skip(self: Learner, batch: Any, number: int) -> StepResult:
        seen.append(number)
        self.skipped += 1
        nothing = torch.zeros(())
        return StepResult({"loss": nothing}, nothing, torch.zeros(len(batch.captions)), torch.zeros(2, 10))

    monkeypatch.setattr(Learner, "step", skip)
    recipe = recipe_of(tmp_path, "--train.steps", "40", "--train.max-skipped", "3")
    with pytest.raises(UserError, match="the gradient of the last 3 steps was not finite"):
        train(recipe)
    assert seen == [0, 1, 2]
    assert read_config(tmp_path / "shapes").train.max_skipped == 3
