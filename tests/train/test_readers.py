"""Pictures and captions read from disk: each kind of file becomes the right RGB, each kind of bad input a sentence."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms
from torch.utils.data import DataLoader

import train.data.index
from train.data.example import Example
from train.data.index import NoSplitError, open_images
from train.data.readers import ImageDataset, _cover, decode, parse_prefixes, prefixed
from train.data.sampler import PositionSampler, index_at
from train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PICTOGRAMS = ROOT.parent / "shared/data/pictograms"


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def plain(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    return encoded(Image.new("RGB", size, (level, level, level)))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_parquet(file: Path, rows: int, *, first: int = 0, row_group_size: int = 4, **columns: Any) -> Path:
    """Rows whose picture is a flat grey of the row's number (first, first + 1, …)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    table = {"caption": [f"grey {n}" for n in numbers], "image": [plain(n) for n in numbers], **columns}
    pq.write_table(
        pa.table({name: cells for name, cells in table.items() if cells is not None}),
        file,
        row_group_size=row_group_size,
    )
    return file


def write_folder(folder: Path, lines: Sequence[Mapping[str, Any]], name: str = "captions.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(lines):
        for field in ("file_name", "file", "image", "path", "thumb"):
            if field in line:
                (folder / line[field]).parent.mkdir(exist_ok=True)
                (folder / line[field]).write_bytes(plain(number))
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def levels(path: Path, **options: Any) -> list[int]:
    """The grey level of each row's picture, which names the row."""
    index = open_images(path, **options)
    dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    return [int(dataset[n].image[0, 0, 0]) for n in range(len(index))]


def sentence(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert "row 2: the cell of column 'image' names the missing file gone.png" in sentence(lambda: dataset[2])
    assert "train.parquet row 3: the cell of column 'image' is empty" in sentence(lambda: dataset[3])


def test_big_sets_keep_two_row_groups_and_small_ones_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", 12)
    write_parquet(tmp_path / "b.parquet", 12, first=12)

    def kept_after_a_walk() -> int:
        index = open_images(tmp_path)
        for row in (0, 23, 5, 12, 4, 17, 9, 1):
            assert index.row(row).image == plain(row)
        return len(index._reader._tables)  # type: ignore[attr-defined]

    assert kept_after_a_walk() == 6
    monkeypatch.setattr(train.data.index, "_KEEP_ALL_BYTES", 100)
    assert kept_after_a_walk() == 2


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
def test_broken_parquet_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    write_parquet(tmp_path / "train-0.parquet", 1)
    (tmp_path / "train-1.parquet").write_bytes(content)
    message = sentence(lambda: open_images(tmp_path))
    assert "train-1.parquet" in message
    assert what in message


def test_parquet_damaged_in_the_middle_is_named_when_the_row_is_read(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", 8)
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    file.write_bytes(content)
    index = open_images(tmp_path)
    assert "train.parquet: row group 0 cannot be read" in sentence(lambda: index.row(0))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", ":2: this line is no JSON"),
        ("[1]", ":2: this line is no JSON object, but list"),
        ('{"caption": "c"}', ":2: no field names a picture file"),
        ('{"file_name": "gone.png", "caption": "c"}', ":2: there is no picture file"),
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


# Decoding


def test_exact_size_is_not_resampled() -> None:
    pixels = noise(24, 40)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), height=24, width=40, name="x"), pixels)


@pytest.mark.parametrize(("height", "width"), [(24, 47), (31, 40)])
def test_one_axis_too_long_is_cropped_at_the_centre_without_resampling(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - 24) // 2, (width - 40) // 2
    expected = pixels[top : top + 24, left : left + 40]
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), height=24, width=40, name="x"), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (333, 10), (97, 101), (640, 480), (3, 3)])
def test_any_size_covers_any_other(height: int, width: int) -> None:
    content = encoded(Image.new("RGB", (width, height), (9, 8, 7)))
    for target in ((16, 16), (33, 7), (5, 64)):
        image = decode(content, height=target[0], width=target[1], name="x")
        assert image.shape == (*target, 3)
        assert image.dtype == np.uint8
        assert (image == np.array([9, 8, 7], dtype=np.uint8)).all()


def test_no_pair_of_sizes_trips_over_rounding() -> None:
    draws = np.random.default_rng(0).integers(1, 200, (2000, 4)).tolist()
    for width, height, target_width, target_height in [*draws, [1, 199, 199, 1], [199, 1, 1, 199]]:
        shape = _cover(Image.new("L", (width, height)), target_height, target_width).size
        assert shape == (target_width, target_height)


def test_crop_is_centred_and_keeps_the_aspect_ratio() -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255  # the middle square is all that a square crop shows
    image = decode(encoded(Image.fromarray(pixels)), height=20, width=20, name="x")
    assert image[:, 2:-2].min() > 240
    picture = Image.fromarray(noise(30, 60))
    scaled = np.asarray(picture.resize((40, 20), Image.Resampling.LANCZOS))[:, 10:30].astype(int)
    assert np.abs(decode(encoded(picture), height=20, width=20, name="x") - scaled).max() <= 1


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1).astype(np.uint8)


def test_large_jpeg_decoded_at_reduced_scale_equals_full_resampling() -> None:
    # Detail at the scale of the target: decoding at less than its size would lose it.
    picture = Image.fromarray(noise(48, 64)).resize((400, 300), Image.Resampling.BICUBIC)
    expected = np.asarray(picture.resize((64, 48), Image.Resampling.LANCZOS)).astype(int)
    error = np.abs(decode(encoded(picture, "JPEG", quality=95), height=48, width=64, name="x") - expected)
    assert error.mean() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(format: str, orientation: int) -> None:
    upright = smooth(48, 96)
    store: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(store[orientation](upright))), format, exif=exif, quality=95)
    assert np.abs(decode(content, height=48, width=96, name="x").astype(int) - upright).max() <= 12


def test_broken_exif_does_not_spoil_a_picture() -> None:
    content = encoded(Image.fromarray(smooth(16, 16)), "JPEG", exif=b"Exif\0\0garbage!")
    assert decode(content, height=16, width=16, name="x").shape == (16, 16, 3)


def test_transparent_parts_become_white_also_at_other_sizes() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (10, 20, 30, 255)
    pixels[:, 8:] = (255, 0, 0, 0)  # hidden red
    for size in (16, 8):
        for format in ("PNG", "WEBP"):
            options = {"lossless": True, "exact": True} if format == "WEBP" else {}
            content = encoded(Image.fromarray(pixels), format, **options)
            image = decode(content, height=size, width=size, name="x").astype(int)
            assert image[0, 0].tolist() == [10, 20, 30]
            assert image[0, -1].tolist() == [255, 255, 255]
            assert (image[..., 0] <= image[..., 1] + 1).all()  # no red bled in
    half = np.full((8, 8, 2), (100, 128), np.uint8)
    assert abs(int(decode(encoded(Image.fromarray(half)), height=8, width=8, name="x")[0, 0, 0]) - 177) <= 1


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 128, 64])
    palette.paste(0, (0, 0, 4, 8))
    opaque = decode(encoded(palette), height=8, width=8, name="x")
    assert (opaque[0, 0].tolist(), opaque[0, -1].tolist()) == ([255, 0, 0], [0, 128, 64])
    for format in ("PNG", "GIF"):
        image = decode(encoded(palette, format, transparency=0), height=8, width=8, name="x")
        assert (image[0, 0].tolist(), image[0, -1].tolist()) == ([255, 255, 255], [0, 128, 64])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    levels16 = np.array([[0, 257, 65378, 65535]] * 4, np.uint16)  # 65378 / 257 = 254.4
    image = decode(encoded(Image.fromarray(levels16), format), height=4, width=4, name="x")
    assert image[0].tolist() == [[0] * 3, [1] * 3, [254] * 3, [255] * 3]


def test_grey_bilevel_and_cmyk_become_rgb() -> None:
    assert (decode(encoded(Image.new("L", (8, 8), 77)), height=8, width=8, name="x") == 77).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1)), height=8, width=8, name="x") == 255).all()
    for format in ("JPEG", "TIFF"):
        cyan = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), format)
        assert np.abs(decode(cyan, height=8, width=8, name="x").astype(int) - [0, 255, 255]).max() <= 3


def test_animated_files_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        image = decode(
            encoded(frames[0], format, save_all=True, append_images=frames[1:], **options), height=8, width=8, name="x"
        )
        assert image[4, 4].tolist() == [200, 0, 0]


def bomb(side: int) -> bytes:
    """A PNG of 70 bytes that says it has side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    message = sentence(lambda: decode(bomb(side), height=8, width=8, name="set/a.parquet row 3"))
    assert message.startswith("set/a.parquet row 3: the picture is too large")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    content = encoded(Image.fromarray(noise(200, 200)), format)
    message = sentence(lambda: decode(content[: int(share * len(content))], height=64, width=64, name="here row 1"))
    assert message.startswith("here row 1: the picture cannot be decoded")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"


@pytest.mark.parametrize("content", [b"", b"no picture", EPS])
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    reason = "EPS, which is a program" if content == EPS else "no known picture format"
    assert f"cannot be decoded ({reason}" in sentence(lambda: decode(content, height=8, width=8, name="here"))
    (tmp_path / "a.jpg").write_bytes(content)
    assert "cannot be decoded" in sentence(lambda: decode(tmp_path / "a.jpg", height=8, width=8, name="here"))


def test_float_pictures_are_refused_since_their_range_is_unknown() -> None:
    content = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    assert "32-bit floats" in sentence(lambda: decode(content, height=8, width=8, name="here"))


def test_embedded_profile_is_left_alone() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = noise(8, 8)
    content = encoded(Image.fromarray(pixels), icc_profile=profile)
    assert np.array_equal(decode(content, height=8, width=8, name="x"), pixels)


# Examples


def styled(tmp_path: Path, **options: Any) -> ImageDataset:
    write_parquet(
        tmp_path / "train.parquet",
        4,
        caption=["Cat.", " COOL button ", "A dog!", "A hat."],
        long=["A long cat.", None, "", "  "],
        source=["emoji", "emoji", "photo", None],
    )
    columns = options.pop("caption_columns", ("caption",))
    index = open_images(tmp_path, caption_columns=columns)
    return ImageDataset(index, caption_columns=columns, height=8, width=8, seed=1, **options)


def test_style_prefix_goes_before_captions_of_its_source_only(tmp_path: Path) -> None:
    dataset = styled(tmp_path, style_column="source", style_prefixes={"emoji": "flat icon of"}, shuffle=False)
    captions = [dataset[n].caption for n in range(4)]
    assert captions == ["flat icon of cat", "flat icon of COOL button", "A dog!", "A hat."]
    plain_ones = styled(tmp_path, style_prefixes={"emoji": "flat icon of"}, shuffle=False)
    assert [plain_ones[n].caption for n in range(4)] == ["Cat.", "COOL button", "A dog!", "A hat."]


def test_prefixed_joins_style_and_caption_as_one_phrase() -> None:
    assert prefixed("A snowman.", "flat icon of") == "flat icon of a snowman"
    assert prefixed("X", "3D render of") == "3D render of x"
    assert prefixed("ATM sign", "3D render of") == "3D render of ATM sign"


def test_each_visit_draws_one_of_the_captions_that_are_not_empty(tmp_path: Path) -> None:
    dataset = styled(tmp_path, caption_columns=("caption", "long"), shuffle=False)
    visits = [dataset[position].caption for position in range(4 * 200)]
    assert [dataset[position].caption for position in range(4 * 200)] == visits
    share = visits[0::4].count("A long cat.") / 200
    assert 0.35 < share < 0.65  # 4 standard deviations of 200 fair draws
    assert set(visits[0::4]) == {"Cat.", "A long cat."}
    assert set(visits[1::4]) == {"COOL button"}
    assert set(visits[3::4]) == {"A hat."}


def test_row_without_any_caption_is_named(tmp_path: Path) -> None:
    dataset = styled(tmp_path, caption_columns=("long",), shuffle=False)
    assert dataset[0].caption == "A long cat."
    assert "train.parquet row 1: no caption in long" in sentence(lambda: dataset[1])


def test_flip_mirrors_the_stated_share_and_the_same_ones_again(tmp_path: Path) -> None:
    pixels = noise(8, 8)
    write_parquet(tmp_path / "train.parquet", 1, image=[encoded(Image.fromarray(pixels))])
    index = open_images(tmp_path)

    def flips(probability: float, seed: int = 0) -> list[bool]:
        dataset = ImageDataset(index, height=8, width=8, seed=seed, flip=probability)
        images = [dataset[position].image for position in range(300)]
        assert all(image.flags.c_contiguous and image.flags.writeable for image in images)
        assert all(np.array_equal(image, pixels) or np.array_equal(image, pixels[:, ::-1]) for image in images)
        return [not np.array_equal(image, pixels) for image in images]

    assert sum(flips(0.0)) == 0
    assert sum(flips(1.0)) == 300
    assert 40 < sum(flips(0.25)) < 110  # 75 expected, 4.7 standard deviations either way
    assert flips(0.5) == flips(0.5) != flips(0.5, seed=1)


def test_positions_follow_the_sampler_and_go_on_over_epochs(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 7)
    index = open_images(tmp_path)
    shuffled = ImageDataset(index, height=8, width=8, seed=4)
    assert len(shuffled) == 7
    assert [int(shuffled[p].image[0, 0, 0]) for p in range(20)] == [index_at(p, size=7, seed=4) for p in range(20)]
    in_order = ImageDataset(index, height=8, width=8, seed=4, shuffle=False)
    assert [in_order[p].key for p in (0, 6, 7)] == [f"train.parquet row {row}" for row in (0, 6, 0)]


def test_unreadable_picture_in_a_set_names_path_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", 2, image=[plain(0), plain(1)[:40]], key=["a", "b"])
    dataset = ImageDataset(open_images(tmp_path), height=8, width=8, seed=0, shuffle=False)
    message = sentence(lambda: dataset[1])
    assert message.startswith(f"{tmp_path}: train.parquet row 1 (b): the picture cannot be decoded")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"style_column": "sauce"}, r"no column 'sauce' \(style_column\).*did you mean 'source'"),
        ({"flip": 1.5}, "flip is a probability from 0 to 1, got 1.5"),
        ({"flip": float("nan")}, "flip is a probability"),
        ({"caption_columns": ()}, "caption_columns is empty"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        styled(tmp_path, **options)


def test_prefixes_are_parsed_or_refused() -> None:
    parsed = parse_prefixes(("noto-emoji=flat icon of", " fluent-3d = 3D render, a=b, of "))
    assert parsed == {"noto-emoji": "flat icon of", "fluent-3d": "3D render, a=b, of"}
    assert parse_prefixes(()) == {}
    for wrong in ("flat icon of", "=of", "noto=", " = "):
        assert f"style prefix {wrong!r}" in sentence(lambda entry=wrong: parse_prefixes((entry,)))  # type: ignore[misc]
    assert "two style prefixes for 'a'" in sentence(lambda: parse_prefixes(("a=b", "a=c")))


def test_reading_needs_no_torch() -> None:
    code = "import sys, train.data.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The real set


def test_pictograms_have_their_rows_captions_and_pictures() -> None:
    if not PICTOGRAMS.is_dir():
        pytest.skip(f"the pictograms set is not at {PICTOGRAMS}")
    prefixes = parse_prefixes(("noto-emoji=flat icon of", "fluent-3d=3D render of"))
    for split, rows in (("train", 3673), ("val", 218)):
        index = open_images(PICTOGRAMS, image_column="image64", split=split)
        assert len(index) == rows
        dataset = ImageDataset(
            index, height=64, width=64, seed=0, style_column="source", style_prefixes=prefixes, shuffle=False
        )
        for position in range(0, rows, 20):
            example, cells = dataset[position], index.row(position).columns
            prefix = prefixes.get(cells["source"])
            assert example.caption == (f"{prefix} {lowered(cells['caption'])}" if prefix else cells["caption"].strip())
            assert example.image.shape == (64, 64, 3)
            assert example.image.std() > 1  # something is drawn
            assert example.image[[0, 0, -1, -1], [0, -1, 0, -1]].mean() > 200  # on white
            assert cells["key"] in example.key
            assert cells["split"] == split


def lowered(caption: str) -> str:
    return caption if caption[1:2].isupper() else caption[0].lower() + caption[1:]
