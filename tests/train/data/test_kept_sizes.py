"""Sizes of pictures are read once: by one of several processes, and never again while the data are the same."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import train.data.formats.parquet
from train.data import kept_sizes
from train.data.index import open_images
from train.data.kept_sizes import picture_sizes

from .picture_files import grey_tar, plain, write_folder, write_parquet

COLUMNS = ("width", "height")
SHAPES = [(8 + n, 20 - n) for n in range(8)]


def shaped(file: Path, **columns: Any) -> Path:
    """Eight pictures of other shapes each; Pillow's sizes are width first."""
    return write_parquet(file, 8, image=[plain(0, shape) for shape in SHAPES], row_group_size=3, **columns)


def count_reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each picture whose head is looked at."""
    seen: list[int] = []
    read = train.data.formats.parquet.upright_size

    def counted(*arguments: Any) -> tuple[int, int]:
        seen.append(1)
        return read(*arguments)

    monkeypatch.setattr(train.data.formats.parquet, "upright_size", counted)
    return seen


@pytest.mark.parametrize("kept_in", ["beside", "cache"])
def test_a_second_start_reads_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_in: str) -> None:
    shaped(tmp_path / "data/train.parquet")
    seen = count_reading(monkeypatch)
    cache = tmp_path / "cache" if kept_in == "cache" else None
    for _ in range(3):
        sizes = picture_sizes(open_images(tmp_path / "data"), COLUMNS, cache)
        assert sizes.tolist() == [[height, width] for width, height in SHAPES]
    assert len(seen) == 8
    folder = tmp_path / ("cache" if kept_in == "cache" else "data/.sizes")
    assert [file.suffix for file in folder.iterdir()] == [".npy"]
    assert len(open_images(tmp_path / "data")) == 8, "what is kept is no data"


def test_columns_of_parquet_need_neither_pictures_nor_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"width": [width for width, _ in SHAPES], "height": [height for _, height in SHAPES]}
    shaped(tmp_path / "train.parquet", **told)
    seen = count_reading(monkeypatch)
    assert picture_sizes(open_images(tmp_path), COLUMNS, None).tolist() == [[h, w] for w, h in SHAPES]
    assert seen == []
    assert not (tmp_path / ".sizes").exists()


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [
        ([5, None, -1, 2**31 - 1], [7, 7, 7, 7], [[7, 5], [0, 0], [0, 0], [7, 2**31 - 1]]),
        ([5, 2**40, 1, 0], [7, 7, 0, 7], [[7, 5], [0, 0], [0, 0], [0, 0]]),
        (["5", "x", "", "6.0"], [7, 7, 7, 7], [[7, 5], [0, 0], [0, 0], [7, 6]]),
        ([5.0, float("nan"), float("inf"), 6.5], [7, 7, 7, 7], [[7, 5], [0, 0], [0, 0], [7, 6]]),
        (pa.array([5, 6, 7, 8], pa.uint64()), pa.array([7, 7, None, 7], pa.uint8()), [[7, 5], [7, 6], [0, 0], [7, 8]]),
    ],
)
def test_numbers_and_texts_of_size_columns(tmp_path: Path, width: Any, height: Any, wanted: list[list[int]]) -> None:
    write_parquet(tmp_path / "train.parquet", 4, width=width, height=height)
    assert open_images(tmp_path).sizes(*COLUMNS).tolist() == wanted


def test_rows_of_other_splits_and_files_without_the_columns(tmp_path: Path) -> None:
    shaped(tmp_path / "a.parquet", split=["train", "val"] * 4)
    both = {"width": [width for width, _ in SHAPES], "height": [height for _, height in SHAPES]}
    shaped(tmp_path / "b.parquet", split=["val"] * 7 + ["train"], **both)
    shapes = [[height, width] for width, height in SHAPES]
    index = open_images(tmp_path)
    assert index.sizes(*COLUMNS).tolist() == [[0, 0]] * 4 + shapes[7:]
    assert index.sizes("absent", "absent").tolist() == shapes[::2] + shapes[7:]


def test_a_folder_that_cannot_be_written_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shaped(tmp_path / "train.parquet")
    (tmp_path / ".sizes").write_text("a file in its place")
    seen = count_reading(monkeypatch)
    for _ in range(2):
        assert picture_sizes(open_images(tmp_path), COLUMNS, None)[0].tolist() == [20, 8]
    assert len(seen) == 16


def test_pictures_that_may_change_one_by_one_are_kept_in_a_cache_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", [{"file_name": "a.png", "caption": "c"}])
    assert picture_sizes(open_images(folder), COLUMNS, None).tolist() == [[8, 8]]
    assert not (folder / ".sizes").exists()
    grey_tar(tmp_path / "tar/a.tar", 3)
    assert picture_sizes(open_images(tmp_path / "tar"), COLUMNS, None).tolist() == [[8, 8]] * 3
    assert (tmp_path / "tar/.sizes").is_dir()


def test_other_data_in_the_same_place_are_read_anew(tmp_path: Path) -> None:
    shaped(tmp_path / "train.parquet")
    assert len(picture_sizes(open_images(tmp_path), COLUMNS, None)) == 8
    write_parquet(tmp_path / "train.parquet", 5)
    assert picture_sizes(open_images(tmp_path), COLUMNS, None).tolist() == [[8, 8]] * 5


def _rank(path: str, barrier: Any, answers: Any) -> None:
    """One of several processes that start together."""
    seen: list[int] = []
    read = train.data.formats.parquet.ParquetIndex.sizes

    def counted(self: Any, *columns: str) -> np.ndarray:
        seen.append(1)
        return read(self, *columns)

    train.data.formats.parquet.ParquetIndex.sizes = counted  # type: ignore[method-assign]
    index = open_images(path)
    barrier.wait()
    answers.put((len(seen), picture_sizes(index, COLUMNS, None).tolist(), len(seen)))


def test_of_four_ranks_one_reads_for_all(tmp_path: Path) -> None:
    for number in range(20):
        shaped(tmp_path / f"train-{number}.parquet")
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_rank, args=(str(tmp_path), barrier, answers)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(read for _, _, read in found) == [0, 0, 0, 1]
    assert all(sizes == [[height, width] for width, height in SHAPES] * 20 for _, sizes, _ in found)


def test_what_a_killed_rank_has_begun_another_does(tmp_path: Path) -> None:
    shaped(tmp_path / "train.parquet")
    (tmp_path / ".sizes").mkdir()
    index = open_images(tmp_path)
    name = f"upright-{kept_sizes.sha256([index.fingerprint, *COLUMNS])[:32]}"
    dead = {"host": os.uname().nodename, "pid": 2**22 + 1, "born": "1"}
    (tmp_path / ".sizes" / f"{name}.claim").write_text(json.dumps(dead))
    assert picture_sizes(index, COLUMNS, None)[7].tolist() == [13, 15]
    assert [file.name for file in (tmp_path / ".sizes").iterdir()] == [f"{name}.npy"]
