"""Going on with a run: what may have changed, what is refused with the difference, what `--force` passes over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.checkpoint.damage import DAMAGES
from tests.train.commands import TINY, run_program
from train.checkpoint import checkpointer as checkpoint
from train.commandline import parse
from train.errors import UserError
from train.loop import Trainer
from train.ranks import parallel
from train.recipes import Recipe
from train.run.lock import RunLock

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SETTINGS = [*TINY, "--checkpoint.every", "1", "--checkpoint.keep", "9", "--train.device", "cpu"]


def recipe_of(folder: Path, *words: str) -> Recipe:
    recipe = parse(["shapes", *SETTINGS, "--train.steps", "2", "--output.folder", str(folder), *words]).recipe
    assert isinstance(recipe, Recipe)
    return recipe


def resume(recipe: Recipe, **arguments: Any) -> Trainer:
    trainer = Trainer(recipe, parallel.start(recipe.train), **arguments)
    trainer.checkpointer.close()
    return trainer


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps with both checkpoints; to be copied."""
    recipe = recipe_of(tmp_path_factory.mktemp("two"))
    return Trainer(recipe, parallel.start(recipe.train)).run().folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> Path:
    shutil.copytree(two_steps, tmp_path / "shapes")
    return tmp_path


CHANGES = [
    (["--train.seed", "5"], "train.seed 0 -> 5"),
    (["--data.height", "64"], "data.height 32 -> 64"),
    (["--adam.lr", "0.5"], "adam.lr .* -> 0.5"),
]


@pytest.mark.parametrize(("words", "difference"), CHANGES)
def test_other_settings_are_refused_with_the_difference_and_forced_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], difference: str
) -> None:
    with pytest.raises(UserError, match=rf"other settings \({difference}\)"):
        resume(recipe_of(folder, *words))
    trainer = resume(recipe_of(folder, *words), force=True)
    assert trainer.step == 2
    assert "as --force says" in capsys.readouterr().out


def test_another_architecture_is_refused_and_forcing_it_names_the_tensors(folder: Path) -> None:
    wider = recipe_of(folder, "--model.bottleneck-size", "8", "--text.depth", "2")
    with pytest.raises(UserError, match="model.bottleneck_size 16 -> 8, text.depth 1 -> 2"):
        resume(wider)
    with pytest.raises(UserError, match=r"does not fit this stage: .*has shape \(.*\) in it, \(.*\) here"):
        resume(wider, force=True)


def test_other_data_are_refused_by_their_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loop.fingerprint", lambda dataset: "other")
    with pytest.raises(UserError, match=r"fingerprint other\) are not those that .*step-00000002 was trained on"):
        resume(recipe_of(folder))
    assert resume(recipe_of(folder), force=True).step == 2


def test_the_recipe_in_a_checkpoint_counts_where_the_runs_own_is_gone(folder: Path) -> None:
    (folder / "shapes/config.json").unlink()
    assert resume(recipe_of(folder)).step == 2
    with pytest.raises(UserError, match="step-00000002 holds a run with other settings"):
        resume(recipe_of(folder, "--train.seed", "5"))


def test_settings_that_change_nothing_computed_may_change(folder: Path) -> None:
    words = ("--checkpoint.every", "2", "--evaluation.prompts", "4", "--train.steps", "3", "--data.workers", "0")
    assert resume(recipe_of(folder, *words)).step == 2


def test_a_damaged_newest_checkpoint_costs_its_steps_only(folder: Path, two_steps: Path) -> None:
    DAMAGES["flip"](folder / "shapes/checkpoints/step-00000002/optimizer.rank00000.safetensors")
    recipe = recipe_of(folder)
    outcome = Trainer(recipe, parallel.start(recipe.train)).run()
    a, b = (checkpoint.load(run / "checkpoints/step-00000002").tensors for run in (outcome.folder, two_steps))
    assert all(torch.equal(a[section][name], tensor) for section in b for name, tensor in b[section].items())


def test_a_failed_start_leaves_the_folder_free(folder: Path) -> None:
    with pytest.raises(UserError):
        resume(recipe_of(folder, "--model.bottleneck-size", "8"), force=True)
    RunLock(folder / "shapes").release()


def test_a_second_job_in_a_folder_is_refused_in_one_sentence_and_writes_nothing(folder: Path) -> None:
    held = RunLock(folder / "shapes")
    before = sorted(p.name for p in (folder / "shapes").rglob("*"))
    words = ("--train.steps", "4", "--output.folder", str(folder))
    done = run_program("speedrun", "shapes", *SETTINGS, *words)
    after = sorted(p.name for p in (folder / "shapes").rglob("*"))
    held.release()
    assert done.returncode == 2
    assert "is in use by another job (host " in done.stderr
    assert done.stderr.count("\n") == 1
    assert after == before


def test_force_is_no_field_and_reaches_the_command() -> None:
    assert parse(["shapes", "--force"]).force
    assert not parse(["shapes"]).force
    assert parse(["shapes", "--force"]).recipe == parse(["shapes"]).recipe


@pytest.mark.parametrize("field", ["every", "keep"])
def test_a_checkpoint_setting_below_one_is_refused(field: str) -> None:
    with pytest.raises(UserError, match="checkpoint.every and keep must be at least 1"):
        parse(["shapes", f"--checkpoint.{field}", "0"])


def test_the_recipe_saved_with_a_checkpoint_is_the_runs(folder: Path) -> None:
    run = folder / "shapes"
    saved = json.loads((run / "checkpoints/step-00000001/config.json").read_text())
    assert saved == json.loads((run / "config.json").read_text())
