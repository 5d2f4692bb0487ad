"""Finding rows of parquet files and image folders; each kind of bad input is a sentence."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from torch.utils.data import DataLoader

import train.data.formats.parquet
from train.data.example import Example
from train.data.index import open_images
from train.data.readers import ImageDataset
from train.data.rows import NoSplitError
from train.data.sampler import PositionSampler

from .picture_files import levels, plain, sentence, write_folder, write_parquet

ROOT = Path(__file__).resolve().parents[3]


# Parquet


def test_parquet_files_are_chosen_by_the_split_in_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 6)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 3, first=6)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", 2, first=20)
    write_parquet(tmp_path / "data/constraints.parquet", 2, first=30)
    assert levels(tmp_path) == list(range(9))
    assert levels(tmp_path, split="val") == [20, 21]
    with pytest.raises(NoSplitError, match="no test split"):
        open_images(tmp_path, split="test")


def test_parquet_split_column_decides_where_no_name_does(tmp_path: Path) -> None:
    splits = ["val", "train", "validation", "Train", None, "test", "other"]
    write_parquet(tmp_path / "all.parquet", 7, split=splits, row_group_size=2)
    assert levels(tmp_path) == [1, 3, 4, 6]
    assert levels(tmp_path, split="val") == levels(tmp_path / "all.parquet", split="val") == [0, 2]
    assert levels(tmp_path, split="test") == [5]
    assert open_images(tmp_path, split="val").row(1).key == "all.parquet row 2"


def test_no_row_is_in_train_and_val_where_name_and_column_disagree(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 4, split=pa.array(["train", "val", "train", "val"]).dictionary_encode())
    assert levels(tmp_path) == [0, 2]
    assert levels(tmp_path, split="val") == [1, 3]


def test_parquet_without_any_sign_of_a_split_is_all_train(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "part-0.parquet", 5)
    assert levels(tmp_path) == levels(file) == [0, 1, 2, 3, 4]
    with pytest.raises(NoSplitError, match="has no validation split.*part-0.parquet"):
        open_images(tmp_path, split="val")


def test_a_single_file_given_as_path_is_read_whatever_its_name(tmp_path: Path) -> None:
    assert levels(write_parquet(tmp_path / "test.parquet", 2)) == [0, 1]


def test_parquet_row_gives_scalars_and_a_key_with_file_row_and_name(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train.parquet",
        6,
        key=[f"k{n}" for n in range(6)],
        score=[n / 2 for n in range(6)],
        tags=[["a"]] * 6,
        row_group_size=2,
    )
    index = open_images(tmp_path)
    assert index.columns == ("caption", "key", "score")
    row = index.row(5)
    assert row.columns == {"caption": "grey 5", "key": "k5", "score": 2.5}
    assert row.key == "train.parquet row 5 (k5)"
    assert row.image == plain(5)
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            index.row(outside)


def test_parquet_cells_may_be_huggingface_structs_of_bytes_or_path(tmp_path: Path) -> None:
    (tmp_path / "on-disk.png").write_bytes(plain(77))
    cells = [
        {"bytes": plain(5), "path": "a.png"},
        {"bytes": None, "path": "on-disk.png"},
        {"bytes": None, "path": "gone.png"},
        None,
    ]
    write_parquet(tmp_path / "train.parquet", 4, image=cells)
    dataset = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0, shuffle=False)
    assert [int(dataset[n].image.max()) for n in range(2)] == [5, 77]
    assert "row 2: the cell of column 'image' names the missing file gone.png" in sentence(lambda: dataset.read(2))
    assert "train.parquet row 3: the cell of column 'image' is empty" in sentence(lambda: dataset.read(3))


def test_row_groups_stay_in_memory_up_to_a_size_and_one_of_large_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", 12)
    write_parquet(tmp_path / "b.parquet", 12, first=12)

    def kept_after_a_walk() -> int:
        index = open_images(tmp_path)
        for row in (0, 23, 5, 12, 4, 17, 9, 1):
            assert index.row(row).image == plain(row)
        return len(index._reader._tables)  # type: ignore[attr-defined]

    assert kept_after_a_walk() == 6
    group = train.data.formats.parquet.pq.ParquetFile(tmp_path / "a.parquet").read_row_group(0).nbytes
    monkeypatch.setattr(train.data.formats.parquet, "_KEEP_BYTES", 3 * group + group // 2)
    assert kept_after_a_walk() == 3
    monkeypatch.setattr(train.data.formats.parquet, "_WORTH_KEEPING", 1)
    assert kept_after_a_walk() == 1  # a set much larger than that


def test_index_survives_pickling_after_use(tmp_path: Path) -> None:
    index = open_images(write_parquet(tmp_path / "train.parquet", 9))
    index.row(3)
    copy = pickle.loads(pickle.dumps(index))
    assert (len(copy), copy.fingerprint, copy.row(8)) == (9, index.fingerprint, index.row(8))


def test_fingerprint_changes_with_data_and_split_but_not_with_the_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, *, split: str = "train", **columns: Any) -> str:
        write_parquet(tmp_path / folder / "train.parquet", **{"rows": 4, **columns})
        write_parquet(tmp_path / folder / "val.parquet", 4)
        return open_images(tmp_path / folder, split=split).fingerprint

    assert fingerprint("a") == fingerprint("b")
    assert (
        len(
            {
                fingerprint("a"),
                fingerprint("c", rows=5),
                fingerprint("d", split="val"),
                fingerprint("e", extra=["x"] * 4),
            }
        )
        == 4
    )


def captions_of(examples: Sequence[Example]) -> list[str]:
    return [example.caption for example in examples]


def test_dataloader_workers_read_what_the_parent_reads_after_it_has_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 10)
    dataset = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0)
    expected = [dataset[position].caption for position in range(12)]
    loader = DataLoader(
        dataset,
        batch_sampler=PositionSampler(global_batch=4, steps=3),
        num_workers=2,  # type: ignore
        collate_fn=captions_of,
    )
    assert sum(loader, []) == expected


# Image folder


@pytest.mark.parametrize("field", ["file_name", "file", "image", "path"])
def test_jsonl_may_name_the_file_in_four_ways(tmp_path: Path, field: str) -> None:
    write_folder(tmp_path, [{field: f"pictures/{n}.png", "caption": f"grey {n}"} for n in range(3)], "metadata.jsonl")
    index = open_images(tmp_path)
    assert index.row(2).image == tmp_path / "pictures/2.png"
    assert index.row(2).key == "metadata.jsonl line 3 (2.png)"
    assert levels(tmp_path) == [0, 1, 2]


def test_jsonl_image_column_of_ones_own_comes_first(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "thumb": "b.png", "caption": "c"}])
    assert open_images(tmp_path, image_column="thumb").row(0).image == tmp_path / "b.png"
    assert open_images(tmp_path, image_column="absent").row(0).image == tmp_path / "a.png"


def test_jsonl_splits_by_field_or_by_folder(tmp_path: Path) -> None:
    by_field = write_folder(
        tmp_path / "field",
        [
            {"file_name": f"{n}.png", "caption": "c", "split": split}
            for n, split in enumerate(["train", "val", "train"])
        ],
    )
    assert levels(by_field) == [0, 2]
    assert levels(by_field, split="val") == [1]
    by_folder = tmp_path / "folder"
    write_folder(by_folder / "train", [{"file_name": f"{n}.png", "caption": "c"} for n in range(3)])
    with pytest.raises(NoSplitError, match="no validation split"):
        open_images(by_folder, split="val")
    write_folder(by_folder / "val", [{"file_name": "v.png", "caption": "c"}])
    assert levels(by_folder) == [0, 1, 2]
    assert open_images(by_folder, split="val").row(0).key == "val/captions.jsonl line 1 (v.png)"


def test_jsonl_with_blank_lines_byte_order_mark_and_nested_values(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "caption": "é", "tags": ["x"]}])
    text = (tmp_path / "captions.jsonl").read_text()
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\n{text}".encode())
    index = pickle.loads(pickle.dumps(open_images(tmp_path)))
    assert len(index) == 2
    assert index.columns == ("file_name", "caption")
    assert index.row(1).columns == {"file_name": "a.png", "caption": "é"}
    assert index.row(1).key == "captions.jsonl line 3 (a.png)"


# Bad input


def test_missing_path_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "pictograms").mkdir()
    assert "did you mean 'pictograms'" in sentence(lambda: open_images(tmp_path / "pictogram"))
    assert "there is nothing at" in sentence(lambda: open_images(tmp_path / "no/such/place"))


def test_folders_and_files_with_nothing_to_read_say_what_is_there(tmp_path: Path) -> None:
    assert "is an empty folder" in sentence(lambda: open_images(tmp_path))
    for name in ("a.csv", "b.png", "c", "d", "e"):
        (tmp_path / name).write_text("x")
    assert "holds only a.csv, b.png, c, d and 1 more" in sentence(lambda: open_images(tmp_path))
    assert "a.csv is not a parquet file" in sentence(lambda: open_images(tmp_path / "a.csv"))
    assert "split must be train, val or test, got 'trian'" in sentence(lambda: open_images(tmp_path, split="trian"))


def test_folder_with_two_kinds_of_data_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "caption": "c"}])
    (tmp_path / "metadata.jsonl").write_text("")
    assert "both captions.jsonl and metadata.jsonl" in sentence(lambda: open_images(tmp_path))
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "train.parquet", 1)
    assert "both parquet files and captions.jsonl" in sentence(lambda: open_images(tmp_path))


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 2, image=None, picture=[plain(0)] * 2)
    message = sentence(lambda: open_images(tmp_path))
    assert "no column 'image' (image_column); its columns are caption, picture" in message
    message = sentence(lambda: open_images(tmp_path, image_column="picture", caption_columns=("captoin",)))
    assert "no column 'captoin' (caption_columns)" in message
    assert "did you mean 'caption'" in message
    folder = write_folder(tmp_path / "folder", [{"file_name": "a.png", "text": "t"}])
    assert "its columns are file_name, text" in sentence(lambda: open_images(folder))


def test_columns_of_a_wrong_type_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 2, path=["a", "b"], captions=[["a"], ["b"]])
    assert "'path' (image_column) holds string" in sentence(lambda: open_images(tmp_path, image_column="path"))
    message = sentence(lambda: open_images(tmp_path, caption_columns=["captions"]))
    assert "'captions' (caption_columns) holds list" in message


@pytest.mark.parametrize(("content", "what"), [(b"", "is empty (0 bytes)"), (b"no parquet", "no readable parquet")])
def test_broken_parquet_is_named_and_stops_only_where_it_is_the_only_one(
    tmp_path: Path, content: bytes, what: str
) -> None:
    (tmp_path / "train-1.parquet").write_bytes(content)
    message = sentence(lambda: open_images(tmp_path))
    assert "train-1.parquet" in message
    assert what in message
    write_parquet(tmp_path / "train-0.parquet", 3)
    index = open_images(tmp_path)
    assert len(index) == 3
    assert index.problems == (f"{message}; it is left out",)


def test_parquet_damaged_in_the_middle_is_named_when_the_row_is_read(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", 8)
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    file.write_bytes(content)
    index = open_images(tmp_path)
    assert "train.parquet: row group 0 cannot be read" in sentence(lambda: index.row(0))


def test_missing_picture_files_of_a_jsonl_stop_only_where_all_are_missing(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": f"{n}.png", "caption": "c"} for n in range(3)])
    (tmp_path / "0.png").unlink()
    index = open_images(tmp_path)
    assert f"captions.jsonl:1: there is no picture file {tmp_path / '0.png'}" in sentence(lambda: index.row(0))
    assert index.row(1).image == tmp_path / "1.png"
    for name in ("1.png", "2.png"):
        (tmp_path / name).unlink()
    assert "captions.jsonl:1: there is no picture file" in sentence(lambda: open_images(tmp_path))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", ":2: this line is no JSON"),
        ("[1]", ":2: this line is no JSON object, but list"),
        ('{"caption": "c"}', ":2: no field names a picture file"),
        ("\xff\xfe{", ":2: this line is no JSON"),  # written as Latin-1, so no UTF-8
    ],
)
def test_bad_jsonl_lines_are_named_by_number(tmp_path: Path, line: str, what: str) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "caption": "c"}])
    file = tmp_path / "captions.jsonl"
    file.write_bytes(file.read_bytes() + line.encode("latin1"))
    assert f"{file}{what}" in sentence(lambda: open_images(tmp_path))


def test_empty_jsonl_and_files_that_vanish_later(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "caption": "c"}])
    index = open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    assert "captions.jsonl:1: there is no picture file" in sentence(lambda: index.row(0))
    (tmp_path / "captions.jsonl").write_text("")
    assert "captions.jsonl is empty" in sentence(lambda: open_images(tmp_path))
