"""Captions as people write them, through the programs: cached and trained on as they will be drawn."""

import json
from pathlib import Path

import pytest

from ...commands import run_program
from ..picture_files import write_parquet
from .caches import words

CAPTIONS = [" a red cat ", "sign “Hi”", "it’s", "cats &amp; dogs", "it's", "&nbsp;", "plain", "more", "and more"]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("dirty"), len(CAPTIONS)
    cells = {"long": [None] * rows, "source": ["photo"] * rows}
    write_parquet(folder / "train.parquet", rows, caption=CAPTIONS, **cells)
    return folder


def test_a_cache_holds_each_cleaned_caption_once_and_training_finds_it(
    encoder: Path, dirty: Path, tmp_path: Path
) -> None:
    command = words(encoder, dirty, tmp_path / "cache")
    done = run_program("precompute_text", *command)
    assert done.returncode == 0, done.stderr
    # two ways of writing "it's" are one, a row of blanks has no caption, and there is the empty prompt
    assert "encoded 8 captions" in done.stdout
    assert "1 rows have no caption and are never shown, the first train.parquet row 5" in done.stdout
    done = run_program("speedrun", *command, "--evaluation.grid", "0")
    assert done.returncode == 0, done.stderr


def test_a_cache_of_before_cleaning_is_refused_by_name_and_right_without(
    encoder: Path, dirty: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = words(encoder, dirty, cache)
    assert run_program("precompute_text", *command, "--text.no-clean").returncode == 0
    (manifest,) = cache.glob("writer-*.json")
    listed = json.loads(manifest.read_text())
    del listed["encoding"]["clean"]  # as versions before wrote it
    manifest.write_text(json.dumps(listed))
    for program in ("precompute_text", "speedrun"):
        done = run_program(program, *command)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {cache} holds embeddings of other settings (clean False -> True); give --text.cache another one, "
            "or --text.no-clean to train on captions as they were encoded\n"
        )
    done = run_program("speedrun", *command, "--text.no-clean", "--evaluation.grid", "0")
    assert done.returncode == 0, done.stderr
