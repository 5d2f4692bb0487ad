"""Nothing is lost without a word: members of tars, rows and files are samples, or counted with the reason."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.formats import tar_members
from train.data.formats.tar_members import split_name
from train.data.index import open_images
from train.data.readers import ImageDataset
from train.data.rows import Account
from train.errors import UserError

from ...commands import TINY, run_program
from ..picture_files import grey_tar, levels, plain, sentence, write_folder, write_parquet, write_tar

Entry = tuple[str, bytes | str]
"""A member's name and content; a content "->name" is a symbolic link, "=>name" a hard one."""


def pack(file: Path, entries: Sequence[Entry]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                info.linkname = content[2:]
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file


def pairs(file: Path) -> dict[int, str | None]:
    """Caption of each picture, by its grey level."""
    index = open_images(file)
    rows = [index.row(n) for n in range(len(index))]
    texts = [row.columns["caption"] for row in index.text_rows()]
    assert texts == [row.columns["caption"] for row in rows]
    assert index.sizes("width", "height").tolist() == [[8, 8]] * len(rows)
    return dict(zip(levels(file), texts, strict=True)) if all(texts) else dict(enumerate(texts))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("17.jpg", ("17", "jpg")),
        ("00/17.long.TXT", ("00/17", "long.txt")),
        ("v1.2.png", ("v1.2", "png")),
        ("a.b/v1.2.long.txt", ("a.b/v1.2", "long.txt")),
        ("Mr. Smith.png", ("Mr. Smith", "png")),
        ("x.2024.10.full.webp", ("x.2024.10", "full.webp")),
        (".hidden.png", None),
        ("__notes__.json", None),
        ("README", None),
        ("ends.", None),
    ],
)
def test_a_name_is_split_behind_the_parts_that_are_no_words(name: str, parts: tuple[str, str] | None) -> None:
    assert split_name(name) == parts


def test_fifty_five_pairs_with_dots_in_their_names_are_fifty_five_samples(tmp_path: Path) -> None:
    named = [(f"v1.{n}", {"png": plain(n), "txt": f"grey {n}".encode()}) for n in range(50)]
    named += [
        (f"cat.{word}", {"txt": f"grey {50 + n}".encode(), "png": plain(50 + n)}) for n, word in enumerate("abcde")
    ]
    file = write_tar(tmp_path / "a.tar", named)
    assert pairs(file) == {n: f"grey {n}" for n in range(55)}
    assert open_images(file).account == Account("members", 110, 55, 110, {})


def test_pictures_and_texts_of_several_kinds_in_one_sample_stay_one(tmp_path: Path) -> None:
    members = {"full.png": plain(1), "thumb.png": plain(2), "long.txt": b"long", "txt": b"short"}
    index = open_images(write_tar(tmp_path / "a.tar", [("7", members)]), image_column="thumb.png")
    assert (len(index), index.row(0).image, index.row(0).columns["long"]) == (1, plain(2), "long")


def test_members_that_stand_apart_find_one_another(tmp_path: Path) -> None:
    entries: list[Entry] = [(f"{n}.png", plain(n)) for n in range(6)]
    entries += [(f"{n}.txt", f"grey {n}".encode()) for n in reversed(range(6))]
    file = pack(tmp_path / "a.tar", entries)
    assert pairs(file) == {n: f"grey {n}" for n in range(6)}
    kept = [open_images(file, cache=tmp_path / "cache") for _ in range(2)]
    assert [index.row(3).columns["caption"] for index in kept] == ["grey 3"] * 2
    assert kept[0].account == kept[1].account == Account("members", 12, 6, 12, {})


def test_links_are_followed_inside_their_tar_and_counted_where_they_lead_nowhere(tmp_path: Path) -> None:
    entries: list[Entry] = [
        ("a.png", plain(0)), ("a.txt", b"grey 0"),
        ("b.png", "=>a.png"), ("b.txt", b"grey 0 again"),
        ("deep/c.png", "->../later.png"), ("deep/c.txt", "->c2.txt"), ("deep/c2.txt", "->../a.txt"),
        ("later.png", plain(3)), ("later.txt", b"grey 3"),
        ("d.png", "->/outside.png"), ("d.txt", b"none"), ("e.png", "->e.png"),
    ]  # fmt: skip
    index = open_images(pack(tmp_path / "a.tar", entries))
    rows = [(index.row(n).image, index.row(n).columns["caption"]) for n in range(len(index))]
    assert rows == [
        (plain(0), "grey 0"), (plain(0), "grey 0 again"), (plain(3), "grey 0"), (plain(3), "grey 3"),
    ]  # fmt: skip
    assert index.account.total == 12
    assert index.account.left[tar_members.NOWHERE] == 2
    assert sum(index.account.left.values()) + index.account.used == 12


def test_duplicates_and_unknown_endings_are_counted_by_the_program_and_at_the_start_of_a_run(tmp_path: Path) -> None:
    entries: list[Entry] = [(f"{n}.{e}", c) for n in range(8) for e, c in (("png", plain(n)), ("txt", b"grey"))]
    entries += [("0.txt", b"another"), ("7.txt", b"more"), ("8.heic", b"?"), ("8.txt", b"a"), ("9.json", b"{}")]
    entries += [("._0.png", b"mac"), ("Makefile", b"")]
    file = pack(tmp_path / "train.tar", entries)
    said = (
        "23 members make 8 samples (of 16 members); left out: "
        "2 in the place of one of the same name (the first is read), 2 hidden, or without an ending, "
        "2 of samples whose picture ends in .heic (install pillow-heif to read it), "
        "1 of samples without a picture that is known (.json)"
    )
    assert open_images(file).account.sentence() == said
    done = run_program("doctor", "prx-512", "--data.path", str(file), "--train.batch", "4", "--json")
    account = json.loads(done.stdout)["account"]
    assert account["total"] == account["used"] + sum(account["left"].values()) == 23
    words = ["pictograms", *TINY, "--data.path", str(file), "--data.image-column", "png", "--data.style-column", ""]
    words += ["--data.height", "8", "--data.width", "8", "--model.patch-size", "8", "--data.workers", "0"]
    done = run_program("speedrun", *words, "--train.steps", "1", "--output.folder", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert f"data: {said}" in done.stdout


def test_heic_is_read_once_its_plugin_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is stood in for: an ending that Pillow has come to know, and content that it knows."""
    file = write_tar(tmp_path / "a.tar", [("1", {"heic": plain(1), "txt": b"grey 1"})])
    assert "install pillow-heif" in sentence(lambda: open_images(file))
    monkeypatch.setitem(tar_members.Image.EXTENSION, ".heic", "HEIF")
    assert pairs(file) == {1: "grey 1"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, which needs pillow-heif"),
        (b"\xff\x0a" + bytes(20), "JPEG XL, which needs"),
    ],
)
def test_a_picture_that_needs_a_plugin_says_which(tmp_path: Path, content: bytes, said: str) -> None:
    write_parquet(tmp_path / "a.parquet", 2, image=[plain(0), content])
    dataset = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0, shuffle=False)
    example = dataset[1]
    assert example.substituted is not None
    assert said in example.substituted.reason


def test_a_hub_cache_is_links_and_read_once(tmp_path: Path) -> None:
    """datasets--x--y/snapshots/REVISION/data/*.parquet lead to blobs; a link leads back up, and a blob is missing."""
    write_parquet(tmp_path / "blobs/b0", 3)
    write_parquet(tmp_path / "blobs/b1", 2, first=3)
    for revision in ("r1", "r2"):
        data = tmp_path / "hub/snapshots" / revision / "data"
        data.mkdir(parents=True)
        for number in (0, 1):
            (data / f"train-{number}.parquet").symlink_to(tmp_path / f"blobs/b{number}")
    (tmp_path / "hub/snapshots/r2/data/train-2.parquet").symlink_to(tmp_path / "blobs/b2")
    (tmp_path / "hub/snapshots/r1/up").symlink_to(tmp_path / "hub")
    (tmp_path / "linked").symlink_to(tmp_path / "hub/snapshots/r1")
    assert sorted(levels(tmp_path / "linked")) == list(range(5))
    (tmp_path / "around").mkdir()
    (tmp_path / "around/set").symlink_to(tmp_path / "hub/snapshots/r1")
    assert sorted(levels(tmp_path / "around")) == list(range(5))
    index = open_images(tmp_path / "hub")
    assert len(index) == 5
    assert len(index.problems) == 3
    assert "is the same file as" in index.problems[0]
    assert "train-2.parquet leads to" in index.problems[2]
    assert index.problems[2].endswith("where nothing is; it is left out")


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    grey_tar(tmp_path / "train-0.tar", 2)
    grey_tar(tmp_path / "more-1.tar", 2)
    (tmp_path / "train-1.tar.gz").write_bytes(b"?")
    packed, unsaid = open_images(tmp_path).problems
    assert packed.endswith("train-1.tar.gz is compressed, which allows no random access; it is left out: unpack it")
    assert unsaid.startswith("1 files are left out, whose names say no split where those of others do (more-1.tar)")


def test_rows_and_lines_of_other_splits_are_counted(tmp_path: Path) -> None:
    splits = ["train", "val", "train", "test"]
    write_parquet(tmp_path / "p/data.parquet", 4, split=splits)
    lines = [{"file_name": f"{n}.png", "caption": "c", "split": split} for n, split in enumerate(splits)]
    write_folder(tmp_path / "f", lines)
    assert open_images(tmp_path / "p").account.sentence() == (
        "4 rows make 2 samples; left out: 2 of other splits than train"
    )
    assert open_images(tmp_path / "f", split="val").account.sentence() == (
        "4 lines make 1 samples; left out: 3 of other splits than val"
    )


def test_columns_of_one_name_lists_and_no_rows_are_sentences_with_their_cause(tmp_path: Path) -> None:
    image, text = pa.array([plain(0)]), pa.array(["a"])
    for name, table in {
        "twice": pa.Table.from_arrays([image, text, text], names=["image", "caption", "caption"]),
        "lists": pa.table({"image": image, "caption": [["a", "b"]]}),
        "empty": pa.table({"image": image, "caption": text}).slice(0, 0),
    }.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    said = {
        name: sentence(lambda n=name: open_images(tmp_path / f"{n}.parquet")) for name in ("twice", "lists", "empty")
    }  # type: ignore[misc]
    assert said["twice"].endswith(
        "has 2 columns called 'caption' (caption_columns), which cannot be told apart; give them names of their own"
    )
    assert said["lists"].endswith("not text; each row has a list of captions, so write a column for each")
    assert "has no rows" in said["empty"]


def test_a_split_column_that_is_no_utf_8_does_not_end_the_start(tmp_path: Path) -> None:
    splits = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\4\0\0\0"), pa.py_buffer(b"\xffval"))
    pq.write_table(
        pa.table({"image": [plain(0), plain(1)], "caption": ["a", "b"], "split": splits}), tmp_path / "a.parquet"
    )
    assert (len(open_images(tmp_path)), len(open_images(tmp_path, split="val"))) == (1, 1)


def test_an_account_that_does_not_add_up_is_no_account() -> None:
    with pytest.raises(ValueError, match="10 rows are not 8 and"):
        Account("rows", 10, 8, 8, {"lost": 1})


def test_a_folder_of_links_in_a_ring_ends(tmp_path: Path) -> None:
    os.symlink(tmp_path, tmp_path / "ring")
    grey_tar(tmp_path / "train.tar", 2)
    assert len(open_images(tmp_path)) == 2
    with pytest.raises(UserError):
        open_images(tmp_path / "nothing")
