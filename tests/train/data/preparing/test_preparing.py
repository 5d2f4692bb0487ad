"""prepare.py: what its shards hold, what is dropped and counted, and that stopping it changes no byte of its result."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.train.commands import ROOT, run_program
from tests.train.data.formats.mds_files import write_mds
from tests.train.data.picture_files import encoded, noise, sentence, write_folder, write_tar
from train.data.claims import is_held, take
from train.data.index import open_images
from train.data.preparing.plan import Plan, make_plan
from train.data.preparing.running import prepare
from train.data.preparing.settings import Prepare
from train.data.readers import ImageDataset, decode

SHAPES = ((128, 128), (160, 96), (96, 170), (64, 64))


def picture(number: int, format: str = "JPEG", **options: Any) -> bytes:
    """Blocks of colours, so that no two are the same and scaling shows."""
    height, width = SHAPES[number % len(SHAPES)]
    blocks = np.random.default_rng(number).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels = np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width]
    return encoded(Image.fromarray(pixels), format, **({"quality": 90} if format == "JPEG" else {}), **options)


def source(file: Path, rows: int = 24, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [picture(n) for n in range(rows)], "caption": [f"picture {n}" for n in range(rows)], **columns}
    pq.write_table(
        pa.table({name: cells for name, cells in table.items() if cells is not None}), file, row_group_size=8
    )
    return file


def made(out: Path, *sources: Path, **settings: Any) -> tuple[Plan, dict[str, Any]]:
    usual: dict[str, Any] = {"sizes": (64,), "rows": 8, "group": 4, "workers": 1}
    plan = make_plan([str(path) for path in sources], Prepare(out=str(out), **{**usual, **settings}))
    return plan, prepare(plan, 1)


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]


def tree(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# What the shards hold


def test_pictures_are_what_training_would_make_of_the_source(tmp_path: Path) -> None:
    """Lossless, so that every pixel can be held against the readers' own of the source."""
    raw = source(tmp_path / "raw" / "train.parquet")
    made(tmp_path / "out", raw, format="lossless", patch=16)
    sizes = []
    before, after = open_images(raw), open_images(tmp_path / "out" / "64")
    assert len(after) == 24
    told = after.sizes("width", "height")
    for row in range(24):
        height, width = told[row].tolist()
        first, second = (
            decode(index.row(row).image, height=height, width=width, name="x") for index in (before, after)
        )
        np.testing.assert_array_equal(first, second)
        sizes.append((height, width))
    assert len(set(sizes)) == 3, "buckets of three shapes"


def test_sizes_captions_names_and_groups_of_a_shard(tmp_path: Path) -> None:
    captions = {"short": ["a", None, ""] * 8, "long": [f"long {n}" for n in range(24)]}
    raw = source(tmp_path / "raw" / "train.parquet", caption=None, key=[f"k{n}" for n in range(24)], **captions)
    _, manifest = made(tmp_path / "out", raw, caption_columns=("short", "long", "absent"))
    rows = rows_of(tmp_path / "out" / "64")
    assert rows[0]["caption"] == ["a", "long 0"]
    assert rows[0]["caption_column"] == ["short", "long"]
    assert rows[1]["caption"] == ["long 1"]
    assert [row["key"] for row in rows] == [f"k{n}" for n in range(24)]
    assert {row["source"] for row in rows} == {"train.parquet"}
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))
    file = pq.ParquetFile(tmp_path / "out/64/train-000000.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [4, 4]
    index = open_images(tmp_path / "out/64")
    dataset = ImageDataset(index, height=64, width=64, seed=0, shuffle=False)
    assert {dataset[24 * visit].caption for visit in range(20)} == {"a", "long 0"}
    assert list(dataset.captions())[:3] == ["a", "long 0", "long 1"]
    assert sum(manifest["sizes"]["64"]["buckets"].values()) == 24


def test_no_picture_is_read_to_open_a_prepared_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "out", source(tmp_path / "raw" / "train.parquet"))
    index = open_images(tmp_path / "out/64")

    def refuse(*_: object) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("train.data.formats.parquet.upright_size", refuse)
    monkeypatch.setattr("train.data.formats.parquet._cell_size", refuse)
    assert index.sizes("width", "height").min() >= 32


@pytest.mark.parametrize(
    ("settings", "formats", "ending"),
    [
        ({}, {"JPEG"}, "JPEG 4:4:4"),
        ({"chroma": "half"}, {"JPEG"}, "JPEG 4:2:0"),
        ({"format": "webp"}, {"WEBP"}, "webp"),
        ({"format": "lossless"}, {"WEBP"}, "lossless"),
    ],
)
def test_formats(tmp_path: Path, settings: dict[str, Any], formats: set[str], ending: str) -> None:
    from PIL import JpegImagePlugin

    made(tmp_path / "out", source(tmp_path / "raw" / "train.parquet", 3), **settings)
    for row in rows_of(tmp_path / "out/64"):
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.format in formats
            if image.format == "JPEG":
                assert JpegImagePlugin.get_sampling(image) == (0 if ending.endswith("4:4:4") else 2)


def test_a_picture_of_the_right_size_and_format_stays_as_it_is(tmp_path: Path) -> None:
    pixels = Image.fromarray(noise(64, 64))
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [encoded(pixels, "JPEG", quality=80), encoded(pixels, "PNG"), encoded(pixels, "JPEG", exif=turned)]
    made(tmp_path / "out", source(tmp_path / "raw" / "train.parquet", 3, image=pictures))
    rows = rows_of(tmp_path / "out/64")
    assert [row["image"] == content for row, content in zip(rows, pictures, strict=True)] == [True, False, False]
    made(tmp_path / "lossless", tmp_path / "raw", format="lossless")
    rows = rows_of(tmp_path / "lossless/64")
    assert [row["image"] == content for row, content in zip(rows, pictures, strict=True)] == [True, True, False]


def test_every_readable_form_becomes_the_same_rows(tmp_path: Path) -> None:
    pictures = [picture(n) for n in range(4)]
    source(tmp_path / "parquet" / "train.parquet", 4)
    write_tar(
        tmp_path / "tar" / "a.tar", [(f"{n:03}", {"jpg": p, "txt": b"picture %d" % n}) for n, p in enumerate(pictures)]
    )
    folder = write_folder(tmp_path / "folder", [{"file_name": f"{n}.jpg", "caption": f"picture {n}"} for n in range(4)])
    for number, content in enumerate(pictures):
        (folder / f"{number}.jpg").write_bytes(content)
    cells = [{"image": content, "caption": f"picture {n}".encode()} for n, content in enumerate(pictures)]
    write_mds(tmp_path / "mds", {"caption": "str", "image": "jpeg"}, [cells[:3], cells[3:]], packed=True)
    found = []
    for kind in ("parquet", "tar", "folder", "mds"):
        made(tmp_path / "out" / kind, tmp_path / kind)
        found.append([(row["image"], row["caption"]) for row in rows_of(tmp_path / "out" / kind / "64")])
    assert len(found[0]) == 4
    assert found[0] == found[1] == found[2] == found[3]


def test_splits_stay_apart_and_columns_are_kept(tmp_path: Path) -> None:
    source(tmp_path / "raw/train.parquet", 8, style=["x"] * 8)
    source(tmp_path / "raw/val.parquet", 4, image=[picture(n + 50) for n in range(4)], style=["y"] * 4)
    made(tmp_path / "out", tmp_path / "raw", keep_columns=("style",))
    lengths = [len(open_images(tmp_path / "out/64", split=split)) for split in ("train", "val")]
    assert lengths == [8, 4]
    assert {row["style"] for row in rows_of(tmp_path / "out/64", "val")} == {"y"}


# What is dropped


def test_every_row_is_kept_or_counted_under_one_reason(tmp_path: Path) -> None:
    pictures = [picture(n) for n in range(24)]
    pictures[2] = b"no picture"
    pictures[9] = pictures[1]
    pictures[3] = encoded(Image.new("RGB", (20, 20)))
    captions: list[str | None] = [f"picture {n}" for n in range(24)]
    captions[4] = " "
    keys = [f"k{n}" for n in range(24)]
    keys[10] = "k1"
    raw = source(tmp_path / "raw/train.parquet", image=pictures, caption=captions, key=keys, score=[*range(23), None])
    _, manifest = made(tmp_path / "out", raw, sizes=(64, 128), filter="score < 20")
    small, large = (manifest["sizes"][side] for side in ("64", "128"))
    assert small["dropped"] == {
        "broken": 1,
        "duplicate key": 1,
        "duplicate picture": 1,
        "filtered": 4,
        "no caption": 1,
        "too small": 1,
    }
    assert large["dropped"]["too small"] > 1
    for size in (small, large):
        assert size["seen"] == 24 == size["kept"] + sum(size["dropped"].values())
        assert size["kept"] == sum(shard["rows"] for shard in size["shards"]) == sum(size["buckets"].values())
    listed = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert {(e["row"].split(": ")[1], e["reason"]) for e in listed if e["size"] == 64} == {
        ("train.parquet row 2", "broken"),
        ("train.parquet row 3", "too small"),
        ("train.parquet row 4", "no caption"),
        ("train.parquet row 9", "duplicate picture"),
        ("train.parquet row 10", "duplicate key"),
    }
    assert "k9" not in [row["key"] for row in rows_of(tmp_path / "out/64")]


def test_the_manifest_tells_the_truth_about_files(tmp_path: Path) -> None:
    _, manifest = made(tmp_path / "out", source(tmp_path / "raw/train.parquet"), sizes=(64, 96))
    files = tree(tmp_path / "out")
    for size in manifest["sizes"].values():
        for shard in size["shards"]:
            file = tmp_path / "out" / shard["file"]
            assert shard["sha256"] == files[shard["file"]]
            assert (shard["bytes"], shard["rows"]) == (file.stat().st_size, pq.ParquetFile(file).metadata.num_rows)
    assert {name for name in files if name.endswith(".parquet")} == {
        shard["file"] for size in manifest["sizes"].values() for shard in size["shards"]
    }
    assert set(files) - {"manifest.json", "dropped.jsonl"} == {name for name in files if ".parquet" in name}


def test_a_duplicate_of_a_row_that_is_itself_dropped_stays(tmp_path: Path) -> None:
    """Row 1 goes because of its key, so row 2, which has its picture, is the only one that shows it."""
    pictures = [picture(0), picture(1), picture(1)]
    raw = source(tmp_path / "raw/train.parquet", 3, image=pictures, key=["a", "a", "b"])
    made(tmp_path / "out", raw)
    assert [row["key"] for row in rows_of(tmp_path / "out/64")] == ["a", "b"]
    _, manifest = made(tmp_path / "all", raw, duplicates="keep")
    assert manifest["sizes"]["64"]["kept"] == 3


def test_duplicates_are_found_across_sources_and_an_enlarging_limit_holds(tmp_path: Path) -> None:
    first, second = source(tmp_path / "a/train.parquet", 4), source(tmp_path / "b/train.parquet", 6)
    _, manifest = made(tmp_path / "out", first.parent, second.parent)
    assert manifest["sizes"]["64"]["dropped"] == {"duplicate picture": 4}
    assert {row["source"] for row in rows_of(tmp_path / "out/64")} == {"a", "b"}
    _, manifest = made(tmp_path / "large", first.parent, sizes=(128,), enlarge=2.0)
    assert manifest["sizes"]["128"]["kept"] == 4


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"caption_columns": ("captoin",)}, "no column 'captoin' (--caption-columns)"),
        ({"filter": "scor > 5"}, "no column 'scor' (--filter)"),
        ({"keep_columns": ("style",)}, "no column 'style' (--keep-columns)"),
        ({"keep_columns": ("caption",)}, "--keep-columns caption: a shard has a column of this name"),
        ({"sizes": (100,)}, "--sizes 100 is no multiple of --patch 32"),
        ({"sizes": (64, 64)}, "each once"),
        ({"image_column": "picture"}, "no column 'picture'"),
    ],
)
def test_settings_that_do_not_fit_are_sentences(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    raw = source(tmp_path / "raw/train.parquet", 2)
    assert said in sentence(lambda: made(tmp_path / "out", raw, **settings))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_or_of_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    raw = source(tmp_path / "raw/train.parquet", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("do not touch")
    assert "is not empty" in sentence(lambda: made(tmp_path / "mine", raw))
    made(tmp_path / "out", raw)
    assert "was begun with --quality 92, and now it is 90" in sentence(lambda: made(tmp_path / "out", raw, quality=90))
    source(raw, 5)
    assert "was begun with other data" in sentence(lambda: made(tmp_path / "out", raw))


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    assert "--caption-columns" in run_program("prepare", "--help").stdout
    for words, said in (
        (["--out", "x"], "give the sources before all options"),
        ([str(tmp_path)], "give the folder to write into"),
        ([str(tmp_path / "absent"), "--out", "x"], "there is nothing at"),
        ([str(tmp_path), "--out", "x", "--quality", "0"], "quality must be at least 1"),
    ):
        done = run_program("prepare", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr


def test_a_dry_run_writes_nothing_and_says_time_and_disk(tmp_path: Path) -> None:
    raw = source(tmp_path / "raw/train.parquet")
    done = run_program(
        "prepare", str(raw), "--out", str(tmp_path / "out"), "--sizes", "64", "--dry-run", "--sample", "6"
    )
    assert done.returncode == 0, done.stderr
    assert "24 rows in 1 sources" in done.stdout
    assert "core hours" in done.stdout
    assert "about 24 kept" in done.stdout
    assert not (tmp_path / "out").exists()


# Stopping


WORDS = ["--sizes", "64", "96", "--rows", "4", "--group", "4", "--filter", "score != 7"]


def start(raw: Path, out: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train/prepare.py"), str(raw), "--out", str(out), *WORDS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def duplicated(file: Path) -> Path:
    """Forty pictures, some of them twice, some broken."""
    pictures = [picture(n % 31) for n in range(40)]
    pictures[11] = b"no picture"
    return source(file, 40, image=pictures, caption=[f"c{n}" for n in range(40)], score=list(range(40)))


@pytest.mark.timeout(600)
def test_killed_at_ten_random_points_it_ends_in_the_bytes_of_one_left_alone(tmp_path: Path) -> None:
    raw = duplicated(tmp_path / "raw/train.parquet")
    alone = start(raw, tmp_path / "alone", "--workers", "1")
    assert alone.wait(120) == 0, alone.communicate()
    rng, killed = random.Random(0), 0
    words = [str(raw), "--out", str(tmp_path / "out"), *WORDS, "--workers", "1"]
    # Stopped by a count of calls that put files in their places: no clock decides where, and every step has its turn.
    while not (tmp_path / "out/manifest.json").exists():
        code = KILLER.format(root=str(ROOT), calls=rng.randint(1, 24), words=words)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode == -signal.SIGKILL
    last = start(raw, tmp_path / "out", "--workers", "1")
    assert last.wait(120) == 0, last.communicate()
    assert killed >= 10
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert len(tree(tmp_path / "alone")) > 10


KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
left = {calls}
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.replace, os.link, os.fsync, os.rename = map(counted, (os.replace, os.link, os.fsync, os.rename))
import train.prepare
sys.argv = ["prepare.py", *{words!r}]
sys.exit(train.prepare.main())
"""
"""Kills itself at the n-th file that is put in its place, before or after it."""


@pytest.mark.timeout(600)
def test_two_commands_at_a_time_share_the_work_and_a_killed_one_leaves_nothing_held(tmp_path: Path) -> None:
    raw = duplicated(tmp_path / "raw/train.parquet")
    made_alone = start(raw, tmp_path / "alone", "--workers", "1")
    assert made_alone.wait(120) == 0
    both = [start(raw, tmp_path / "out", "--workers", "2") for _ in range(3)]
    assert both[0].stdout is not None
    both[0].stdout.readline()  # a unit is done
    os.killpg(both[0].pid, signal.SIGKILL)
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both[1:]] == [0, 0], said
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    units = [line.split(" of ")[0] for out, _ in said[1:] for line in out.splitlines() if line.startswith("unit")]
    assert len(units) == len(set(units)), "a unit was made twice"


def test_a_claim_is_held_by_one_ends_with_its_holder_and_is_given_back(tmp_path: Path) -> None:
    file = tmp_path / "claim"
    claim = take(file)
    assert claim is not None
    assert take(file) is None
    assert is_held(file)
    claim.release()
    assert not is_held(file)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from train.data.claims import take; from pathlib import Path; take(Path({str(file)!r}))"  # noqa: E501
    subprocess.run([sys.executable, "-c", code], check=True)
    assert file.exists(), "a process that ended without giving it back"
    assert not is_held(file)
    again = take(file)
    assert again is not None
    assert is_held(file)


@pytest.mark.parametrize(("age", "held"), [(30, True), (3600, False)])
def test_a_claim_of_another_machine_ends_after_its_patience(tmp_path: Path, age: int, held: bool) -> None:
    file = tmp_path / "claim"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "1"}))
    os.utime(file, (file.stat().st_mtime - age,) * 2)
    assert is_held(file) is held
    assert (take(file) is None) is held
