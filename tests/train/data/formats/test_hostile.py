"""Hostile or broken archives: reading has a bound in time, depth and memory, and ends in a sentence or a substitute."""

import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.formats.storage import Storage
from train.data.index import open_images
from train.data.quarantine import Quarantine
from train.data.readers import ImageDataset
from train.data.rows import BadSample
from train.side_files import objects

from ..picture_files import grey_tar, plain, sentence, write_folder, write_parquet, write_tar

pytestmark = pytest.mark.timeout(60)
BLOCK = 512


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with any bytes as its size, and the right checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size.ljust(12, b"\0")
    block[136:148], block[148:156], block[156:157], block[257:265] = b"0" * 11 + b"\0", b" " * 8, kind, b"ustar  \0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(size: int) -> bytes:
    """GNU's binary form of a size, which has a sign."""
    return b"\xff" + (256**11 + size).to_bytes(11, "big")


def member(name: str, content: bytes) -> bytes:
    return header(name, b"%011o" % len(content)) + content + bytes(-len(content) % BLOCK)


# The damage may belong to the sample right before it, which then does not count.
GOOD = b"".join(member(f"{n}.png", plain(n)) + member(f"{n}.txt", b"grey") for n in (7, 8))


def chain(kind: bytes, content: bytes) -> bytes:
    """Three thousand headers, each of which says something about the next."""
    return (header("chain", b"%011o" % len(content), kind) + content.ljust(BLOCK, b"\0")) * 3000


def attribute(record: bytes) -> bytes:
    return header("pax", b"%011o" % len(record), b"x") + record.ljust(BLOCK, b"\0")


ENDLESS = {
    "negative": header("1.png", negative(-BLOCK)),
    "more negative": header("1.png", negative(-10 * BLOCK)),
    "negative long name": header("././@LongLink", negative(-BLOCK), b"L"),
    "huge long name": header("././@LongLink", b"%011o" % (1 << 32), b"L"),
    "chain of long names": chain(b"L", b"abc\0"),
    "chain of attributes": chain(b"x", b"11 path=a.b\n"),
    "attribute size": attribute(b"12 size=abc\n"),
    "negative attribute": attribute(b"13 size=-512\n") + header("1.png", b"0"),
    "huge": header("1.png", b"%011o" % (7 << 30)),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_hostile_tar_ends_in_a_sentence_and_what_was_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + ENDLESS[name] + member("2.png", plain(9)) + bytes(2 * BLOCK))
    index = open_images(tmp_path, caption_columns=("caption",))
    assert index.row(0).columns["caption"] == "grey"
    assert len(index.problems) == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.tar").write_bytes(ENDLESS[name])
    assert sentence(lambda: open_images(tmp_path / "b"))


def test_json_of_a_hundred_thousand_brackets_is_a_sample_without_fields(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    rows = [(f"{n}", {"png": plain(n), "txt": b"grey", "json": deep if n == 1 else b'{"a": 1}'}) for n in range(3)]
    write_tar(tmp_path / "a.tar", rows)
    index = open_images(tmp_path)
    assert [index.row(n).columns["a"] for n in range(3)] == [1, None, 1]
    write_folder(tmp_path / "folder", [{"file_name": "a.png", "caption": "a"}])
    with (tmp_path / "folder" / "captions.jsonl").open("ab") as file:
        file.write(deep + b"\n")
    assert "captions.jsonl:2: this line is no JSON (nested too deep)" in sentence(
        lambda: open_images(tmp_path / "folder")
    )


def test_names_that_are_no_utf_8_are_read_and_quarantined(tmp_path: Path) -> None:
    shard = os.fsdecode(b"\xff\xfe.tar")
    with tarfile.open(tmp_path / shard, "w") as tar:
        for name, content in (("\udcff\udc80.png", b"no picture"), ("\udcff\udc80.txt", b"a"), ("1.png", plain(3)), ("1.txt", b"b")):  # fmt: skip  # noqa: E501
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    index = open_images(tmp_path)
    assert len(index.fingerprint) == 64
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    example = dataset[0]
    assert example.substituted is not None
    assert "\udcff" in example.substituted.key
    quarantine = Quarantine(tmp_path / "run", 0, 0.5)
    quarantine.add_shards([f"{shard} is damaged"])
    quarantine._append([{"position": 0, "key": example.substituted.key, "reason": example.substituted.reason}])
    entries, bad = objects(tmp_path / "run/quarantine/rank-0.jsonl")
    assert bad == []
    assert entries[1]["key"] == example.substituted.key


def test_text_of_parquet_that_is_no_utf_8_is_a_row_without_that_caption(tmp_path: Path) -> None:
    captions = pa.StringArray.from_buffers(
        3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")
    )
    pq.write_table(pa.table({"caption": captions, "image": [plain(n) for n in range(3)]}), tmp_path / "a.parquet")
    index = open_images(tmp_path)
    assert [index.row(n).columns["caption"] for n in range(3)] == ["a", None, "b"]
    assert [row.columns["caption"] for row in index.text_rows()] == ["a", None, "b"]
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    with pytest.raises(BadSample, match="no caption"):
        dataset.read(1)


class Talker(BaseHTTPRequestHandler):
    """Answers every range of bytes with as much as anyone takes."""

    sent = 0
    status = 206
    length: str | None = None

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Range", "bytes 0-511/1000000000")
        if self.length is not None:
            self.send_header("Content-Length", self.length)
        self.end_headers()
        try:
            for _ in range(400):
                self.wfile.write(bytes(1 << 20))
                type(self).sent += 1 << 20
        except OSError:
            pass


@pytest.fixture
def talker() -> Iterator[str]:
    Talker.sent = 0
    server = HTTPServer(("127.0.0.1", 0), Talker)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("length", [None, "400000000", "abc"])
def test_a_server_that_answers_more_than_was_asked_for_is_not_read_to_its_end(
    talker: str, monkeypatch: pytest.MonkeyPatch, length: str | None
) -> None:
    monkeypatch.setattr(Talker, "length", length)
    message = sentence(lambda: Storage(timeout=5.0, tries=1).read(talker, 0, 512))
    assert "answers more than the 512 bytes asked for" in message or "Content-Length" in message
    assert Talker.sent < 50 << 20  # what the system's own buffers hold


# --- symptom instead of cause -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "folder", "parquet"])
def test_a_caption_that_is_a_list_is_called_a_list(tmp_path: Path, kind: str) -> None:
    fields = {"caption": ["a", "b"], "width": 8}
    if kind == "tar":
        write_tar(tmp_path / "a.tar", [("0", {"png": plain(0), "json": json.dumps(fields).encode()})])
    elif kind == "folder":
        write_folder(tmp_path, [{"file_name": "a.png", **fields}])
    else:
        write_parquet(tmp_path / "a.parquet", 2, caption=[["a"], ["b"]])
    assert "list" in sentence(lambda: open_images(tmp_path))
    assert "no column" not in sentence(lambda: open_images(tmp_path))


def test_data_without_any_column_say_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0", {"png": plain(0)})])
    message = sentence(lambda: open_images(tmp_path))
    assert message.endswith("has no column 'caption' (caption_columns); it has no column of text, numbers or booleans")


def blank(folder: Path) -> None:
    (folder / "captions.jsonl").write_text("\n\n")


@pytest.mark.parametrize(
    ("write", "told"),
    [(lambda folder: write_parquet(folder / "a.parquet", 0), "has no rows"), (blank, "is empty")],
)
def test_zero_rows_are_told_and_not_a_missing_split(tmp_path: Path, write: Callable[[Path], object], told: str) -> None:
    write(tmp_path)
    message = sentence(lambda: open_images(tmp_path))
    assert told in message
    assert "split" not in message


def test_a_whole_shard_is_still_read(tmp_path: Path) -> None:
    index = open_images(grey_tar(tmp_path / "a.tar", 20))
    assert [index.row(n).columns["txt"] for n in range(20)] == [f"grey {n}" for n in range(20)]
    assert index.problems == ()


def test_a_parquet_file_whose_column_names_are_not_utf8_is_told(tmp_path: Path) -> None:
    """Found by fuzzing: pyarrow decodes the names in the lists of row groups when they are asked for."""
    write_parquet(tmp_path / "a.parquet", 4)
    content = (tmp_path / "a.parquet").read_bytes()
    at = content.rindex(b"image", 0, content.rindex(b"ARROW:schema"))
    (tmp_path / "a.parquet").write_bytes(content[:at] + b"im\x80ge" + content[at + 5 :])
    assert "a.parquet: its list of columns cannot be read" in sentence(lambda: open_images(tmp_path))


def test_a_row_whose_split_is_not_utf8_is_of_the_split_of_its_file(tmp_path: Path) -> None:
    """Found by fuzzing, as the next one."""
    splits = pa.StringArray.from_buffers(
        3, pa.py_buffer(np.array([0, 5, 7, 12], np.int32)), pa.py_buffer(b"train\xff\xfetrain")
    )
    columns = {"image": [plain(n) for n in range(3)], "caption": ["a", "b", "c"], "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    index = open_images(tmp_path)
    assert [index.row(n).columns["caption"] for n in range(len(index))] == ["a", "b", "c"]


def test_a_file_name_with_a_null_byte_is_a_picture_without_a_size(tmp_path: Path) -> None:
    write_folder(tmp_path, [{"file_name": "a.png", "caption": "a"}])
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "b\0.png", "caption": "b"}) + "\n")
    index = open_images(tmp_path)
    assert index.sizes("width", "height").tolist()[1] == [0, 0]
    with pytest.raises(BadSample):
        index.row(1)
