"""Side files end no good run, and a full disk is a warning, then a stop."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from prx_model.teacher_weights import fill
from tests.train.commands import TINY, run_program
from tests.train.test_resume import folder, recipe_of, resume, two_steps  # noqa: F401
from train import errors
from train.data.quarantine import Quarantine
from train.errors import UserError
from train.loop import Trainer
from train.ranks import parallel
from train.run.metrics import Metrics, drop_metrics_after
from train.side_files import objects, parse_json, write_whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DEEP = b"[" * 100_000


@pytest.mark.parametrize("content", [b"", b'{"preset": "sha', b"\xff\xfe", DEEP, b'{"a":' * 100_000])
def test_a_run_goes_on_from_its_checkpoint_where_config_json_is_empty_or_cut(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    (folder / "shapes" / "config.json").write_bytes(content)
    trainer = resume(recipe_of(folder))
    assert trainer.step == 2
    assert "config.json is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="train.seed 0 -> 5"):  # the checkpoint's own still counts
        resume(recipe_of(folder, "--train.seed", "5"))


def test_config_json_is_the_old_one_or_the_new_one_whenever_a_crash_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "config.json", "old")

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "config.json", "new")
    assert (tmp_path / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_json_that_nests_too_deep_is_no_json() -> None:
    for text in (DEEP, b'{"a":' * 100_000, b"\xff", b"", b"9" * 5000):
        with pytest.raises(ValueError):  # noqa: PT011 (json's own words differ)
            parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


def test_lines_of_metrics_that_are_no_json_are_set_aside_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"step": step, "train/loss": 0.5}).encode() for step in (10, 20, 30)]
    bad = [b"\xff\xfe\x80", b'{"step": 12', DEEP, b"[]", b"null"]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    drop_metrics_after(tmp_path, 20)
    assert [line["step"] for line in objects(tmp_path / "metrics.jsonl")[0]] == [10, 20]
    assert (tmp_path / "metrics.jsonl.bad").read_bytes().splitlines() == bad
    assert capsys.readouterr().out.count("warning") == 1
    drop_metrics_after(tmp_path, 20)
    assert capsys.readouterr().out == ""


def test_lines_of_a_quarantine_that_are_no_entries_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quarantine").mkdir()
    whole = json.dumps({"position": 3, "key": "a", "reason": "b"}).encode()
    odd = [b'{"position": "x"}', b'{"position": [1]}', b'{"position": 4}']
    (tmp_path / "quarantine/rank-0.jsonl").write_bytes(b"\n".join([b"garbage", whole, DEEP, *odd, b"\x80"]) + b"\n")
    kept = Quarantine(tmp_path, 0, 0.0)
    assert kept._listed == {3}
    assert capsys.readouterr().out.count("warning") == 1
    with pytest.raises(UserError, match="among them a: b"):
        kept.check(5, 10)


# --- full disk ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_warning_and_then_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, enabled=True)
    metrics.log(1, {"train/loss": 1.0})
    full = True
    append = Metrics._append

    def maybe(self: Metrics, line: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, line)

    monkeypatch.setattr(Metrics, "_append", maybe)
    metrics.log(2, {"train/loss": 1.0})
    assert "metrics.jsonl cannot be written (No space left on device)" in capsys.readouterr().out
    full = False
    metrics.log(3, {"train/loss": 1.0})
    full = True
    metrics.log(4, {"train/loss": 1.0})
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        metrics.log(5, {"train/loss": 1.0})
    metrics.close()
    assert [line["step"] for line in objects(tmp_path / "metrics.jsonl")[0]] == [1, 3]


def test_a_disk_without_room_stops_a_run_at_the_second_reading_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Metrics, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Metrics, "_append", full)
    recipe = recipe_of(tmp_path, "--train.steps", "30", "--checkpoint.every", "30")
    with pytest.raises(UserError, match="make room on its disk and start the same command again"):
        Trainer(recipe, parallel.start(recipe.train)).run()
    assert capsys.readouterr().out.count("warning: ") == 1


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "another folder"),
        (errno.ENOTDIR, "a part of this path is a file"),
        (errno.ENOSPC, "make room on its disk"),
    ],
)
def test_errors_of_the_system_name_path_and_cure(capsys: pytest.CaptureFixture[str], number: int, cure: str) -> None:
    def program() -> int:
        raise OSError(number, os.strerror(number), "/data/there")

    with pytest.raises(SystemExit) as left:
        errors.exit_with_sentence(program)
    assert left.value.code == errors.EXIT_BAD_INPUT
    told = capsys.readouterr().err
    assert told.startswith("error: /data/there: ")
    assert cure in told
    assert told.count("\n") == 1


def test_a_file_in_the_place_of_the_runs_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    done = run_program("speedrun", "shapes", *TINY, "--output.folder", str(tmp_path / "runs"))
    assert done.returncode == errors.EXIT_BAD_INPUT
    assert "Traceback" not in done.stderr
    assert "a part of this path is a file" in done.stderr


def test_a_refused_pickle_does_not_quote_advice_to_run_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"w": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="what a pickle says is never run") as refused:
        fill(torch.nn.Linear(1, 1), "a network", str(tmp_path / "w.pth"), "weights")
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
