"""Checkpoints in one process: what lies on disk, what is refused by name, and what is used in its place."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.checkpoint.damage import DAMAGES, reseal
from train.checkpoint import checkpointer as checkpoint
from train.checkpoint import files
from train.checkpoint.checkpointer import Checkpointer, Tensors, find_newest, load, load_into
from train.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KINDS = ("model.rank00000.safetensors", "ema.rank00000.safetensors", "config.json", "state.json", "manifest.json")


def content(value: float) -> Tensors:
    return {"model": {"w": torch.full((3, 4), value)}, "ema": {"model.w": torch.full((3, 4), value)}}


def saved(run: Path, *steps: int, keep: int = 2) -> Path:
    """A run with checkpoints whose numbers are their step."""
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    checkpointer = Checkpointer(run, keep=keep)
    for step in steps:
        checkpointer.save(step, content(float(step)), {"position": 8 * step})
    checkpointer.finish()
    checkpointer.close()
    return run


def value_of(folder: Path) -> float:
    return load(folder).tensors["model"]["w"].unique().item()


def test_a_save_keeps_what_was_there_when_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are changed before the background writes a byte."""
    changed, original = False, files.begin

    def wait(temporary: Path) -> None:
        while not changed:
            pass
        original(temporary)

    monkeypatch.setattr(files, "begin", wait)
    (tmp_path / "config.json").write_text("{}")
    checkpointer, tensors = Checkpointer(tmp_path, keep=1), content(1.0)
    checkpointer.save(1, tensors, {})
    tensors["model"]["w"].zero_()
    changed = True
    checkpointer.finish()
    checkpointer.close()
    assert value_of(checkpoint.complete(tmp_path)[0]) == 1.0


def test_the_newest_stay_and_nothing_temporary_does(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1, 2, 3)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert (run / "latest").read_text() == "checkpoints/step-00000003\n"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "latest"]
    listed = json.loads((run / "checkpoints/step-00000003/manifest.json").read_text())
    there = {p.name for p in (run / "checkpoints/step-00000003").iterdir()}
    assert listed.keys() == there - {"manifest.json", "COMPLETE"}


def test_left_over_folders_of_a_killed_save_go_at_the_next_start(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1)
    (run / "checkpoints/step-00000002.tmp").mkdir()
    Checkpointer(run, keep=1).close()
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*KINDS, "COMPLETE"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    run = saved(tmp_path / "run", 1, 2)
    last = run / "checkpoints/step-00000002"
    DAMAGES[damage](last / name)
    with pytest.raises(UserError, match=name):
        load(last)
    found = find_newest(run)
    assert found is not None
    tensors = content(0.0)
    load_into(found, tensors)
    assert (found.step, found.state["position"], tensors["model"]["w"].unique().item()) == (1, 8, 1.0)
    assert name in capsys.readouterr().out


def test_a_replaced_damaged_checkpoint_is_whole_again(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1, 2)
    DAMAGES["flip"](run / "checkpoints/step-00000002" / KINDS[0])
    saved(run, 2)
    assert [value_of(folder) for folder in checkpoint.complete(run)] == [1.0, 2.0]


def test_a_damaged_later_checkpoint_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    """Set back to step 2, the run saves 3 and 4 before it reaches 9 again: both stay."""
    run = saved(tmp_path / "run", 2, 9)
    DAMAGES["flip"](run / "checkpoints/step-00000009" / KINDS[0])
    saved(run, 3, 4)
    found = find_newest(run)
    assert found is not None
    assert found.step == 4
    assert value_of(run / "checkpoints/step-00000003") == 3.0


def test_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 1, 2)
    for folder in checkpoint.complete(run):
        DAMAGES["truncate"](folder / KINDS[0])
    with pytest.raises(UserError, match="has no whole checkpoint"):
        find_newest(run)
    assert find_newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("version", [None, 1, 3])
def test_another_format_is_refused_in_a_sentence(tmp_path: Path, version: int | None) -> None:
    run = saved(tmp_path / "run", 1)
    folder = run / "checkpoints/step-00000001"
    state = json.loads((folder / "state.json").read_text())
    state = {k: v for k, v in state.items() if k != "format"} | ({} if version is None else {"format": version})
    (folder / "state.json").write_text(json.dumps(state))
    reseal(folder)
    with pytest.raises(UserError, match=f"says format {version or 1} and this version reads format 2"):
        load(folder)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def bomb(path: Path, mark: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "torch":
        with path.open("wb") as file:
            torch.save({"w": Bomb(mark)}, file)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark), protocol=int(kind)))


@pytest.mark.parametrize("kind", ["0", "2", "4", "torch"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "state.pkl", ".metadata", "__0_0.distcp", "deep/optimizer.pt"]
)
def test_a_planted_pickle_is_refused_by_name_and_not_run(tmp_path: Path, name: str, listed: bool, kind: str) -> None:
    run = saved(tmp_path / "run", 1, 2)
    folder, mark = run / "checkpoints/step-00000002", tmp_path / "mark"
    bomb(folder / name, mark, kind)
    if listed:
        reseal(folder)
    with pytest.raises(UserError, match=name):
        load(folder)
    found = find_newest(run)
    assert found is not None
    assert found.step == 1
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["0", "2", "4", "torch"])
@pytest.mark.parametrize("name", [*KINDS[:4], "weights"])
def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path: Path, name: str, kind: str) -> None:
    """In the place of a file, with a manifest that fits it; or listed under a name of its own."""
    run = saved(tmp_path / "run", 1)
    folder, mark = run / "checkpoints/step-00000001", tmp_path / "mark"
    bomb(folder / name, mark, kind)
    reseal(folder)
    if name == "config.json" and kind == "0":
        from train.run.folder import read_config

        with pytest.raises(UserError, match=name):
            read_config(folder)
    else:
        with pytest.raises(UserError, match=name):
            load(folder)
    assert not mark.exists()


# --- what does not fit -----------------------------------------------------------------------------------------------


def fits(run: Path, change: dict[str, dict[str, Tensor]], **arguments: Any) -> None:
    found = find_newest(run)
    assert found is not None
    load_into(found, content(0.0) | change, **arguments)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"w": torch.zeros(4, 3)}}, r"model/w has shape \(3, 4\) in it, \(4, 3\) here"),
        ({"model": {"w": torch.zeros(3, 4).double()}}, "model/w is torch.float32 in it, torch.float64 here"),
        ({"model": {"v": torch.zeros(3, 4)}}, "model/v is not in it; its model/w has no place here"),
        ({"repa": {"v": torch.zeros(1)}}, "no section 'repa'"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_none_is_changed(tmp_path: Path, change: Tensors, sentence: str) -> None:
    run = saved(tmp_path / "run", 1)
    with pytest.raises(UserError, match=sentence):
        fits(run, change)
    assert not any(tensor.any() for section in change.values() for tensor in section.values())


def test_only_what_is_dropped_by_name_may_be_left_unread(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    checkpointer = Checkpointer(run, keep=1)
    optimizer = {"model.w/m": torch.ones(2), "repa.p/m": torch.ones(2)}
    checkpointer.save(1, content(1.0) | {"repa": {"p": torch.ones(2)}, "optimizer": optimizer}, {}, wait=True)
    checkpointer.close()
    here = {"optimizer": {"model.w/m": torch.zeros(2)}}
    with pytest.raises(UserError, match="its section 'repa' has no place here"):
        fits(run, here)
    with pytest.raises(UserError, match="optimizer/repa.p/m has no place here"):
        fits(run, here | {"repa": {"p": torch.zeros(2)}}, dropped=("repa",))
    fits(run, here, dropped=("repa",))
    assert torch.equal(here["optimizer"]["model.w/m"], torch.ones(2))


def test_only_the_sections_asked_for_are_checked_and_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run", 1) / "checkpoints/step-00000001"
    DAMAGES["delete"](folder / "model.rank00000.safetensors")
    assert load(folder, names=["ema", "tower"]).tensors.keys() == {"ema"}
