"""Text files of a sample in any Unicode, and what cannot be read as that: named, never a wrong letter."""

import json
import re
from pathlib import Path

import pytest

from train.data.formats.cells import plain_text
from train.data.index import open_images
from train.data.readers import ImageDataset
from train.data.rows import BadSample

from ...commands import run_program
from ..picture_files import plain, write_tar

CAPTION = "ein schöner Tag"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", [CAPTION, "", "a", "emoji 🐈, 漢字 and so on"])
def test_text_is_read_in_any_unicode(encoding: str, text: str) -> None:
    assert plain_text(text.encode(encoding)) == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CAPTION.encode("latin-1"), "is no UTF-8 (byte 0xf6 at 7); write it as UTF-8"),
        (b"\xff\xfea", "is no UTF-16 (byte 0x61 at 0); write it as UTF-8"),
        ("漢字".encode("shift-jis"), "is no UTF-8"),
    ],
)
def test_other_encodings_are_named_rather_than_guessed(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        plain_text(content)


def test_a_tar_of_all_encodings_is_read_or_named_and_doctor_says_which(tmp_path: Path) -> None:
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"]
    samples = [(f"{n}", {"png": plain(n), "txt": CAPTION.encode(e)}) for n, e in enumerate(encodings)]
    samples[1][1]["json"] = b"{broken"
    samples[0][1]["json"] = json.dumps({"caption": None, "width": 8}).encode("utf-16")
    path = write_tar(tmp_path / "train.tar", samples)
    index = open_images(path)
    assert [index.row(n).columns["caption"] for n in range(5)] == [CAPTION] * 4 + [None]
    assert index.row(0).columns["width"] == 8
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    with pytest.raises(BadSample, match=r"row 4 \(4\): no caption in caption: \.txt is no UTF-8 \(byte 0xf6 at 7\)"):
        dataset.read(4)
    done = run_program("doctor", "prx-512", "--data.path", str(path), "--train.batch", "2")
    assert "2 texts cannot be read (first train.tar row 1: .json cannot be read" in done.stdout
    assert "row 4 (4): no caption in caption: .txt is no UTF-8 (byte 0xf6 at 7); write it as UTF-8" in done.stdout


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_a_null_never_beats_a_caption_beside_it(tmp_path: Path, nothing: str | None) -> None:
    fields = json.dumps({"caption": nothing}).encode()
    for order in (("txt", "json"), ("json", "txt")):
        members = {"png": plain(1), **{ending: {"txt": b"good", "json": fields}[ending] for ending in order}}
        index = open_images(write_tar(tmp_path / f"{order[0]}.tar", [("a", members)]))
        assert index.row(0).columns["caption"] == "good"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_jsonl_file_of_any_unicode_is_read(tmp_path: Path, encoding: str) -> None:
    lines = [{"file_name": f"{n}.png", "caption": f"{CAPTION} {n}"} for n in range(3)]
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(plain(n))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines)
    (tmp_path / "captions.jsonl").write_bytes(text.encode(encoding))
    index = open_images(tmp_path)
    assert [index.row(n).columns["caption"] for n in range(3)] == [f"{CAPTION} {n}" for n in range(3)]


def test_lines_of_a_jsonl_that_are_latin_1_lose_their_caption_by_name_and_find_their_picture(tmp_path: Path) -> None:
    lines = ['{"file_name": "0.png", "caption": "plain"}', '{"file_name": "é.png", "caption": "schön"}']
    (tmp_path / "0.png").write_bytes(plain(0))
    Path(str(tmp_path) + "/\udce9.png").write_bytes(plain(1))  # named in Latin-1 too
    (tmp_path / "captions.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    index = open_images(tmp_path)
    assert [index.row(n).columns["caption"] for n in range(2)] == ["plain", None]
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    with pytest.raises(BadSample, match="no caption in caption: its caption is no UTF-8; write the JSONL as UTF-8"):
        dataset.read(1)
    assert index.sizes("width", "height").tolist() == [[8, 8], [8, 8]]
