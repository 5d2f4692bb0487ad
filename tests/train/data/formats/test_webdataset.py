"""Tar files of WebDataset: the same rows as parquet gives, found by their headers; damage is named and survived."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from PIL import Image

from train.data.formats import webdataset
from train.data.formats.storage import Storage, expand
from train.data.index import open_images
from train.data.readers import ImageDataset
from train.data.rows import BadSample, NoSplitError

from ..picture_files import encoded, grey_tar, levels, noise, plain, sentence, write_parquet, write_tar


def test_tar_files_give_the_pictures_and_captions_that_parquet_gives(tmp_path: Path) -> None:
    grey_tar(tmp_path / "tar/train-000.tar", 6)
    grey_tar(tmp_path / "tar/deep/train-001.tar", 3, first=6)
    write_parquet(tmp_path / "parquet/train.parquet", 9)
    by_kind = [open_images(tmp_path / kind) for kind in ("tar", "parquet")]
    rows = [sorted((row.image, row.columns["caption"]) for row in map(i.row, range(len(i)))) for i in by_kind]
    assert rows[0] == rows[1]
    assert sorted(levels(tmp_path / "tar")) == list(range(9))


def test_a_tar_row_names_file_number_and_sample(tmp_path: Path) -> None:
    index = open_images(grey_tar(tmp_path / "shard.tar", 3))
    assert (index.row(2).key, index.key(2)) == ("shard.tar row 2 (0002)", "shard.tar row 2")
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            index.row(outside)


def test_captions_come_from_text_files_and_json_fields(tmp_path: Path) -> None:
    fields = {"caption": "from json", "width": 8, "height": 9, "tags": ["no"], "nsfw": False}
    samples: list[tuple[str, dict[str, bytes]]] = [
        ("a/x.y/1", {"jpg": plain(1), "txt": b"from txt", "json": json.dumps(fields).encode()}),
        ("a/x.y/2", {"long.txt": b"a long one", "webp": plain(2), "json": b"{broken"}),
        ("a/x.y/3", {"json": json.dumps(fields).encode()}),
    ]
    index = open_images(write_tar(tmp_path / "a.tar", samples), caption_columns=("caption", "long"))
    assert len(index) == 2  # the third sample has no picture
    assert index.row(0).columns == {
        "txt": "from txt", "caption": "from json", "width": 8, "height": 9, "nsfw": False, "long": None,
    }  # fmt: skip
    assert index.row(1).columns["long"] == "a long one"
    assert index.row(1).image == plain(2)
    assert [row.columns["long"] for row in index.text_rows()] == [None, "a long one"]
    assert index.sizes("width", "height").tolist() == [[9, 8], [0, 0]]


def test_the_image_column_may_name_an_ending(tmp_path: Path) -> None:
    members = {"thumb.png": plain(1), "full.png": plain(2), "txt": b"c"}
    file = write_tar(tmp_path / "a.tar", [("1", members)])
    assert open_images(file, image_column="full.png").row(0).image == plain(2)
    assert open_images(file).row(0).image == plain(1)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header_keep_samples_apart(tmp_path: Path, format: int) -> None:
    long = "d" * 120
    samples = [(f"{long}/{n}{'é' * 60}", {"png": plain(n), "txt": b"c"}) for n in range(4)]
    index = open_images(write_tar(tmp_path / "a.tar", samples, format=format))
    assert [index.row(n).image for n in range(4)] == [plain(n) for n in range(4)]
    assert f"{long}/3é" in index.row(3).key


class Counting(Storage):
    """Counts the bytes that are read from files opened in order."""

    read_bytes = 0

    def open(self, name: Path | str) -> BinaryIO:

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                count = super().readinto(buffer) or 0
                Counting.read_bytes += count
                return count

        return io.BufferedReader(File(str(name)), 512)  # type: ignore[return-value]


def test_a_shard_is_indexed_by_headers_without_the_pictures(tmp_path: Path) -> None:
    picture = encoded(Image.fromarray(noise(300, 300)))
    file = write_tar(tmp_path / "a.tar", [(f"{n}", {"png": picture, "txt": b"c"}) for n in range(20)])
    Counting.read_bytes = 0
    index = open_images(file, storage=Counting())
    assert len(index) == 20
    assert sum(1 for _ in index.text_rows()) == 20
    assert Counting.read_bytes < 0.05 * file.stat().st_size
    assert index.row(19).image == picture


def test_split_is_that_of_the_name(tmp_path: Path) -> None:
    grey_tar(tmp_path / "train-0.tar", 3)
    grey_tar(tmp_path / "val-0.tar", 2, first=10)
    grey_tar(tmp_path / "other.tar", 2, first=20)
    assert levels(tmp_path) == [0, 1, 2]
    assert levels(tmp_path, split="val") == [10, 11]
    with pytest.raises(NoSplitError, match="no test split"):
        open_images(tmp_path, split="test")


def test_brace_patterns_name_files(tmp_path: Path) -> None:
    assert expand("a-{008..010}-{x,y}.tar") == [f"a-{n}-{c}.tar" for n in ("008", "009", "010") for c in "xy"]
    assert "neither a range" in sentence(lambda: expand("a-{7}.tar"))
    assert "runs backwards" in sentence(lambda: expand("a-{7..3}.tar"))
    for number in (0, 1, 3):
        grey_tar(tmp_path / f"shard-{number:06d}.tar", 2, first=2 * number)
    index = open_images(f"{tmp_path}/shard-{{000000..000003}}.tar")
    assert [index.row(n).columns["caption"] for n in range(6)] == [f"grey {n}" for n in (0, 1, 2, 3, 6, 7)]
    assert len(index.problems) == 1
    assert "shard-000002.tar cannot be read (No such file" in index.problems[0]
    assert "no parquet nor tar files alone" in sentence(lambda: open_images(f"{tmp_path}/{{a.tar,b.parquet}}"))


def test_zero_byte_shard_is_named_and_left_out_and_stops_only_where_all_are(tmp_path: Path) -> None:
    (tmp_path / "shard-0.tar").write_bytes(b"")
    assert "shard-0.tar is empty (0 bytes)" in sentence(lambda: open_images(tmp_path))
    grey_tar(tmp_path / "shard-1.tar", 3)
    index = open_images(tmp_path)
    assert len(index) == 3
    assert index.problems == (f"{tmp_path}/shard-0.tar is empty (0 bytes); copy it again or remove it; it is left out",)


def damaged(content: bytes, how: str) -> bytes:
    if how == "cut in a picture":
        return content[: content.index(b"0007.png") + 560]
    if how == "cut in a header":
        return content[: content.index(b"0007.png") + 100]
    if how == "garbage in the middle":
        at = content.index(b"0007.png")
        return content[:at] + bytes([77] * 512) + content[at + 512 :]
    assert how == "compressed"
    return gzip.compress(content)


@pytest.mark.parametrize("how", ["cut in a picture", "cut in a header", "garbage in the middle", "compressed"])
def test_damaged_shard_is_named_and_read_as_far_as_it_goes(tmp_path: Path, how: str) -> None:
    broken = grey_tar(tmp_path / "shard-0.tar", 10)
    broken.write_bytes(damaged(broken.read_bytes(), how))
    grey_tar(tmp_path / "shard-1.tar", 2, first=100)
    index = open_images(tmp_path)
    found = [index.row(n).columns["caption"] for n in range(len(index))]
    whole = 0 if how == "compressed" else len(found) - 2
    assert found == [*(f"grey {n}" for n in range(whole)), "grey 100", "grey 101"]
    assert how == "compressed" or whole in (6, 7)
    assert len(index.problems) == 1
    assert str(broken) in index.problems[0]


def test_shard_cut_after_it_was_indexed_is_a_bad_sample(tmp_path: Path) -> None:
    file = grey_tar(tmp_path / "a.tar", 4)
    index = open_images(file)
    content = file.read_bytes()
    file.write_bytes(content[: content.index(b"0003.txt")])
    assert index.row(2).image == plain(2)
    with pytest.raises(BadSample, match="a.tar row 3: cannot be read"):
        index.row(3)


def test_cache_spares_the_second_start_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey_tar(tmp_path / "data/a.tar", 5)
    (tmp_path / "data/b.tar").write_bytes(b"")
    cache = tmp_path / "cache"
    first = open_images(tmp_path / "data", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(webdataset, "_scan_shard", lambda *_: pytest.fail("the headers were read again"))
        second = open_images(tmp_path / "data", cache=cache)
    assert (second.fingerprint, second.problems, len(second)) == (first.fingerprint, first.problems, 5)
    grey_tar(tmp_path / "data/a.tar", 6)
    assert len(open_images(tmp_path / "data", cache=cache)) == 6


def test_index_survives_pickling_after_use_and_its_fingerprint_moving(tmp_path: Path) -> None:
    for place in ("here", "there"):
        grey_tar(tmp_path / place / "a.tar", 5)
    index = open_images(tmp_path / "here")
    index.row(3)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.row(4) == index.row(4)
    assert open_images(tmp_path / "there").fingerprint == index.fingerprint
    grey_tar(tmp_path / "there/a.tar", 6)
    assert open_images(tmp_path / "there").fingerprint != index.fingerprint


def test_shards_without_pictures_and_missing_captions_are_refused(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "a.tar", [("1", {"txt": b"c"})])
    assert "has no sample with a picture" in sentence(lambda: open_images(file))
    file = write_tar(tmp_path / "b.tar", [("1", {"png": plain(0), "cls": b"7"})])
    assert "no column 'caption' (caption_columns)" in sentence(lambda: open_images(file))


def test_sizes_of_headers_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [
        plain(0, (30, 20)),
        encoded(Image.new("RGB", (30, 20)), "JPEG", exif=turned),
        encoded(Image.new("RGB", (30, 20)), "JPEG", exif=b"Exif\0\0" + bytes(60_000)),
        b"no picture",
    ]
    index = open_images(
        write_tar(tmp_path / "a.tar", [(f"{n}", {"jpg": p, "txt": b"c"}) for n, p in enumerate(pictures)])
    )
    assert index.sizes("width", "height").tolist() == [[20, 30], [30, 20], [20, 30], [0, 0]]
    write_parquet(tmp_path / "p/train.parquet", 4, image=pictures)
    assert open_images(tmp_path / "p").sizes("width", "height").tolist() == index.sizes("width", "height").tolist()
    write_parquet(tmp_path / "q/train.parquet", 2, w=[7, None], h=[5, 6])
    assert open_images(tmp_path / "q").sizes("w", "h").tolist() == [[5, 7], [0, 0]]


def test_examples_of_tar_files_are_decoded(tmp_path: Path) -> None:
    dataset = ImageDataset(open_images(grey_tar(tmp_path / "a.tar", 4)), height=8, width=8, seed=0, shuffle=False)
    assert [(int(dataset[n].image.max()), dataset[n].caption) for n in range(4)] == [(n, f"grey {n}") for n in range(4)]
