"""Values in a valid file: wrong values with right hashes are refused by name, and the one before is taken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.checkpoint.damage import reseal
from train.checkpoint import files
from train.checkpoint.checkpointer import Checkpointer, find_newest, load
from train.checkpoint.files import Chunk, Stored
from train.checkpoint.state import SCHEMA, need
from train.errors import UserError

FACTS = {
    "fingerprint": "abc",
    "stage": 0,
    "first_position": 0,
    "position": 96,
    "skipped": [1, 0],
    "seconds": 3.5,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text("{}")
    checkpointer = Checkpointer(run, keep=5)
    for step in (6, 12):
        checkpointer.save(step, {"model": {"w": torch.full((3, 4), float(step))}}, FACTS, wait=True)
    checkpointer.close()
    return run


def changed(two: Path, run: Path, **values: Any) -> Path:
    """A copy of the run whose newest checkpoint says other things, with hashes that are right; None takes one out."""
    shutil.copytree(two, run)
    folder = files.step_folder(run, 12)
    state = {**json.loads((folder / "state.json").read_text()), **values}
    kept = {name: value for name, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(kept))
    reseal(folder)
    return run


WRONG = [
    ("step", 8, "says step 8, and its folder step-00000012: one was changed"),
    ("step", -5, "says step '-5', which must be a whole number, not negative"),
    ("step", "abc", "says step 'abc'"),
    ("step", True, "says step 'True'"),
    ("step", 12.0, "says step '12.0'"),
    ("step", 10**30, "says step"),
    ("step", None, "does not say its step"),
    ("skipped", [1, 2, 3], r"says skipped '\[1, 2, 3\]', which must be two whole numbers"),
    ("skipped", ["a", "b"], "says skipped"),
    ("skipped", 3, "says skipped"),
    ("seconds", "x", "says seconds 'x', which must be a number, not negative"),
    ("seconds", float("nan"), "says seconds 'nan'"),
    ("seconds", float("inf"), "says seconds 'inf'"),
    ("first_position", -7, "says first_position '-7'"),
    ("position", [], "says position"),
    ("stage", "one", "says stage"),
    ("fingerprint", 3, "says fingerprint '3', which must be a text"),
    ("format", 1, "says format 1"),
    ("format", "two", "says format 'two'"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG)
def test_a_value_that_cannot_be_right_is_refused_by_name_and_the_checkpoint_before_is_taken(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any, sentence: str
) -> None:
    run = changed(two, tmp_path / "run", **{name: value})
    with pytest.raises(UserError, match=sentence):
        load(files.step_folder(run, 12))
    found = find_newest(run)
    assert found is not None
    assert found.step == 6
    assert "step-00000012/state.json" in capsys.readouterr().out


def test_a_state_as_it_is_written_is_read(two: Path) -> None:
    found = find_newest(two)
    assert found is not None
    assert found.step == 12
    assert found.state == {"format": files.FORMAT, "step": 12, **FACTS}
    assert FACTS.keys() | {"step"} == SCHEMA.keys()


def test_a_checkpoint_may_lie_in_a_folder_of_another_name(two: Path, tmp_path: Path) -> None:
    shutil.copytree(files.step_folder(two, 12), tmp_path / "best")
    assert load(tmp_path / "best").step == 12


def test_what_going_on_needs_is_asked_for_by_name(two: Path, tmp_path: Path) -> None:
    found = find_newest(changed(two, tmp_path / "run", skipped=None))
    assert found is not None
    with pytest.raises(UserError, match="does not say skipped, without which nobody can go on from it"):
        need(found.folder, found.state, "seconds", "skipped")


def header(path: Path, change: dict[str, Any]) -> None:
    """Write other places of slices into a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head["__metadata__"]["slices"] = json.dumps(change) if change != {"deep": 1} else "[" * 100_000
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize(
    "places",
    [{}, {"w": 3}, {"w": [[0, 0], [9, 9]]}, {"w": [["a", "b"], [3, 4]]}, {"w": [[-1, 0], [3, 4]]}, {"deep": 1}],
)
def test_a_header_that_is_wrong_with_a_right_hash_falls_back_too(
    two: Path, tmp_path: Path, places: dict[str, Any]
) -> None:
    shutil.copytree(two, tmp_path / "run")
    folder = files.step_folder(tmp_path / "run", 12)
    header(folder / "model.rank00000.safetensors", places)
    reseal(folder)
    found = find_newest(tmp_path / "run")
    assert found is not None
    assert found.step == 6


def test_slices_over_one_another_are_refused_though_they_add_up() -> None:
    """The other half would be memory that nobody wrote."""
    whole, half = (4, 6), (2, 6)
    files._check_cover("w", Stored(whole, torch.float32, [Chunk("a", (0, 0), half), Chunk("b", (2, 0), half)]))
    quarters = [Chunk("c", (row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]
    files._check_cover("w", Stored(whole, torch.float32, quarters))
    for twice in ([Chunk("a", (0, 0), half)] * 2, [*quarters[:3], quarters[0]]):
        with pytest.raises(UserError, match="lie over one another"):
            files._check_cover("w", Stored(whole, torch.float32, list(twice)))
