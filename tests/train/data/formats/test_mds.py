"""MDS shards: files by the library that made the format, splits, remote ones; broken and hostile ones end in sentences.

`mosaic/` holds what mosaicml-streaming 0.13.0 wrote: six samples in shards of two, uncompressed and by zstd.
"""

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.train.data.formats.mds_files import write_mds
from tests.train.data.picture_files import levels, plain, sentence
from train.data.index import open_images
from train.data.readers import ImageDataset, decode
from train.data.rows import BadSample

MOSAIC = Path(__file__).parent / "mosaic"
COLUMNS = {"caption": "str", "height": "int", "image": "png", "width": "int"}


def samples(count: int, first: int = 0) -> list[dict[str, bytes]]:
    side = struct.pack("<q", 8)
    return [
        {"caption": f"grey {n}".encode(), "height": side, "image": plain(n), "width": side}
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("kind", ["whole", "packed"])
@pytest.mark.parametrize("column", ["image", "pixels"])
def test_files_of_the_original_library_are_read(kind: str, column: str) -> None:
    index = open_images(MOSAIC / kind, image_column=column)
    assert len(index) == 6
    assert index.columns == ("caption", "height", "key", "large", "score", "width")
    row = index.row(3)
    assert row.columns == {
        "caption": "grey 120",
        "height": 8,
        "key": "k3",
        "large": 12345678901234567890,
        "score": 1.5,
        "width": 16,
    }
    assert row.key.endswith(" (k3)")
    image = decode(row.image, height=8, width=16, name="x")
    assert (image == 120).all()
    assert index.sizes("width", "height").tolist() == index.sizes("w", "h").tolist() == [[8, 16]] * 6
    assert [text.columns["caption"] for text in index.text_rows()] == [f"grey {40 * n}" for n in range(6)]
    assert index.problems == ()


def test_the_original_library_reads_and_writes_as_this_reader_and_the_tests_do(tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(
        columns=COLUMNS | {"image": "bytes"}, out=str(tmp_path / "a"), compression="zstd"
    ) as writer:
        for n in range(5):
            writer.write({"caption": f"grey {n}", "height": 8, "width": 8, "image": plain(n)})
    assert levels(tmp_path / "a") == list(range(5))
    write_mds(tmp_path / "b", COLUMNS, [samples(3)])
    found = streaming.StreamingDataset(local=str(tmp_path / "b"), batch_size=1)
    assert [found[n]["caption"] for n in range(3)] == ["grey 0", "grey 1", "grey 2"]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_several_shards_in_their_order_and_by_workers(tmp_path: Path, packed: bool) -> None:
    write_mds(tmp_path, COLUMNS, [samples(4), [], samples(3, 4), samples(1, 7)], packed=packed)
    assert levels(tmp_path) == levels(tmp_path / "index.json") == list(range(8))
    index = open_images(tmp_path)
    assert index.key(5) == "shard.00002.mds row 1"
    index.row(0)
    assert pickle.loads(pickle.dumps(index)).row(7).columns["caption"] == "grey 7"
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            index.row(outside)


def test_splits_are_folders_and_a_merged_list_stands_for_those_below_it(tmp_path: Path) -> None:
    write_mds(tmp_path / "set/train", COLUMNS, [samples(4)])
    write_mds(tmp_path / "set/val", COLUMNS, [samples(2, 10)])
    assert levels(tmp_path / "set") == [0, 1, 2, 3]
    assert levels(tmp_path / "set", split="val") == [10, 11]
    assert "has no test split" in sentence(lambda: open_images(tmp_path / "set", split="test"))
    for part in ("0", "1"):
        write_mds(tmp_path / "parts" / part, COLUMNS, [samples(2, 2 * int(part))])
    entries = []
    for part in ("0", "1"):
        entry = json.loads((tmp_path / "parts" / part / "index.json").read_text())["shards"][0]
        entries.append({**entry, "raw_data": {**entry["raw_data"], "basename": f"{part}/shard.00000.mds"}})
    assert levels(tmp_path / "parts") == [0, 1, 2, 3]
    (tmp_path / "parts/index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    assert levels(tmp_path / "parts") == [0, 1, 2, 3]


def test_other_data_have_another_fingerprint(tmp_path: Path) -> None:
    first = open_images(write_mds(tmp_path / "a", COLUMNS, [samples(4)])).fingerprint
    assert open_images(write_mds(tmp_path / "b", COLUMNS, [samples(4)])).fingerprint == first
    assert open_images(write_mds(tmp_path / "c", COLUMNS, [samples(5)])).fingerprint != first


def test_columns_that_are_missing_or_of_another_kind_are_named(tmp_path: Path) -> None:
    write_mds(tmp_path, COLUMNS, [samples(2)])
    assert "no column 'captoin' (caption_columns)" in sentence(
        lambda: open_images(tmp_path, caption_columns=["captoin"])
    )
    assert "'caption' (image_column) holds str" in sentence(lambda: open_images(tmp_path, image_column="caption"))
    assert "'width' (caption_columns) holds int" in sentence(lambda: open_images(tmp_path, caption_columns=["width"]))
    assert "'pickled' (image_column) holds pkl" in sentence(
        lambda: open_images(MOSAIC / "whole", image_column="pickled")
    )


# Broken and hostile


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "json"}, "has format 'json'"),
        ({"version": 1}, "version 1; MDS of version 2 is read"),
        ({"samples": -1}, "has -1 samples"),
        ({"samples": 10**12}, "has 1000000000000 samples"),
        ({"samples": 10**6}, "too few for the places of 1,000,000 samples"),
        ({"samples": True}, "has True samples"),
        ({"column_names": ["caption"]}, "has 1, 4, 4 names, encodings and sizes of columns"),
        ({"column_names": ["a", "a", "b", "c"]}, "two columns of one name"),
        ({"column_sizes": [None, -8, None, 8]}, "-8 bytes"),
        ({"column_sizes": [None, 0, None, 8]}, "0 bytes"),
        ({"raw_data": {"basename": "../../etc/passwd", "bytes": 999}}, "leads out of its folder"),
        ({"raw_data": {"basename": "/etc/passwd", "bytes": 999}}, "has the name '/etc/passwd'"),
        ({"raw_data": {"basename": "shard.00009.mds", "bytes": 999}}, "shard.00009.mds cannot be read"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": 999}}, "instead of 999"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": -5}}, "-5 bytes"),
        ({"raw_data": None}, "is no description of a shard"),
        (
            {"raw_data": {"basename": "x", "bytes": 999}, "zip_data": {"basename": "x.gz"}, "compression": "gz"},
            "is compressed by gz; zstd is read",
        ),
    ],
)
def test_an_index_that_lies_is_a_sentence_and_costs_its_shard_only(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_mds(tmp_path / "bad", COLUMNS, [samples(4)], **changes)
    assert said in sentence(lambda: open_images(tmp_path / "bad"))
    good = json.loads((write_mds(tmp_path / "good", COLUMNS, [samples(2)]) / "index.json").read_text())["shards"]
    bad = json.loads((tmp_path / "bad/index.json").read_text())["shards"]
    shutil.copy(tmp_path / "good/shard.00000.mds", tmp_path / "good/a.mds")
    good[0]["raw_data"]["basename"] = "a.mds"
    (tmp_path / "good/index.json").write_text(json.dumps({"shards": [*bad, *good], "version": 2}))
    index = open_images(tmp_path / "good")
    assert len(index) == 2
    assert said in index.problems[0]
    assert index.problems[0].endswith("it is left out")


@pytest.mark.parametrize("content", ['{"shards": 5}', '{"shards": [5]}', '["shards"]', '{"shards": "x"}', '"shards"'])
def test_a_list_that_is_none_is_a_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    assert "index.json" in sentence(lambda: open_images(tmp_path))


PLACES = {
    "before the first": lambda places: [places[0], 3, *places[2:]],
    "behind the end": lambda places: [*places[:-1], 2**32 - 1],
    "backwards": lambda places: [places[1], places[0], *places[2:]],
    "in another's columns": lambda places: [places[0], places[1] + 1, *places[2:]],
    "of nothing": lambda places: [places[0], places[0], *places[2:]],
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_that_stands_outside_is_replaced_and_the_others_are_read(
    tmp_path: Path, name: str, packed: bool
) -> None:
    write_mds(tmp_path, COLUMNS, [samples(4)], packed=packed)
    file = tmp_path / ("shard.00000.mds.zstd" if packed else "shard.00000.mds")
    content = bytearray(pa.CompressedInputStream(file.open("rb"), "zstd").read() if packed else file.read_bytes())
    places = PLACES[name](list(struct.unpack("<5I", content[4:24])))
    content[4:24] = struct.pack("<5I", *places)
    file.write_bytes(pa.compress(bytes(content), "zstd", asbytes=True) if packed else bytes(content))
    index = open_images(tmp_path)
    said: dict[int, str] = {}
    for row in range(4):
        try:
            index.row(row)
        except BadSample as error:
            said[row] = str(error)
    assert 1 <= len(said) <= 2
    assert all(f"shard.00000.mds row {row}" in text and "\n" not in text for row, text in said.items())
    wrong = list(said)
    assert len(list(index.text_rows())) == 4 - len(wrong)
    assert [row for row in range(4) if not index.sizes("w", "h")[row].all()] == wrong
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    assert dataset[wrong[0]].substituted is not None


def test_lengths_that_are_too_long_are_refused(tmp_path: Path) -> None:
    write_mds(tmp_path, COLUMNS, [samples(2)])
    file = tmp_path / "shard.00000.mds"
    content = bytearray(file.read_bytes())
    first = struct.unpack("<I", content[4:8])[0]
    content[first : first + 4] = struct.pack("<I", 2**32 - 1)
    file.write_bytes(bytes(content))
    with pytest.raises(BadSample, match="its columns take"):
        open_images(tmp_path).row(0)


@pytest.mark.parametrize("damage", ["cut", "noise", "larger", "smaller"])
def test_a_packed_shard_that_cannot_be_unpacked_is_named(tmp_path: Path, damage: str) -> None:
    write_mds(tmp_path, COLUMNS, [samples(4), samples(2, 4)], packed=True)
    file = tmp_path / "shard.00000.mds.zstd"
    content = file.read_bytes()
    told = json.loads((tmp_path / "index.json").read_text())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "noise":
        file.write_bytes(np.random.default_rng(0).bytes(200))
    else:
        told["shards"][0]["raw_data"]["bytes"] += 2**30 if damage == "larger" else -1
        (tmp_path / "index.json").write_text(json.dumps(told))
    index = open_images(tmp_path)
    with pytest.raises(BadSample, match="unpack"):
        index.row(0)
    assert index.row(4).columns["caption"] == "grey 4"


def test_a_shard_that_was_cut_off_after_opening_is_a_bad_sample(tmp_path: Path) -> None:
    write_mds(tmp_path, COLUMNS, [samples(4)])
    index = open_images(tmp_path)
    file = tmp_path / "shard.00000.mds"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BadSample, match="cut off"):
        index.row(3)
    assert "instead of" in sentence(lambda: open_images(tmp_path))


@pytest.mark.parametrize("pixels", [b"", b"x" * 11, struct.pack("<3I", 2**31, 4, 3) + b"RGB", struct.pack("<3I", 4, 4, 3) + b"RGB123", struct.pack("<3I", 4, 4, 3) + b"XYZ" + b"x" * 48, struct.pack("<3I", 4, 4, 99) + b"RGB"])  # fmt: skip  # noqa: E501
def test_pixels_that_do_not_fit_their_description_are_bad_samples(tmp_path: Path, pixels: bytes) -> None:
    write_mds(tmp_path, {"caption": "str", "image": "pil"}, [[{"caption": b"c", "image": pixels}]])
    index = open_images(tmp_path)
    with pytest.raises(BadSample, match=r"shard.00000.mds row 0"):
        index.row(0)
    assert index.sizes("w", "h").shape == (1, 2)
