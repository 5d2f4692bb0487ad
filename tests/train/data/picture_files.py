"""Small pictures, parquet files and image folders that the tests of reading are about."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from train.data.index import open_images
from train.data.readers import ImageDataset
from train.errors import UserError


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


def write_tar(file: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], **options: Any) -> Path:
    """A WebDataset shard: (name, {ending: content}) each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, members in samples:
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file


def grey_tar(file: Path, rows: int, *, first: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    """A shard whose pictures are a flat grey of the row's number, as `write_parquet` writes them."""
    return write_tar(
        file, [(f"{n:04d}", {"png": plain(n, size), "txt": f"grey {n}".encode()}) for n in range(first, first + rows)]
    )
