"""Pictures a second that one core decodes and scales, by file kind and way, and reads at random from a large set.

No GPU is needed: `pytest benchmarks/test_decoding.py --benchmark-only`; "OPS" are pictures a second of one core.
"""

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.photographs import photograph
from train.data.index import open_images
from train.data.readers import decode

# Other processes on the machine do not count.
pytestmark = pytest.mark.benchmark(timer=time.process_time)
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def stored(size: int, format: str) -> bytes:
    stream = io.BytesIO()
    photograph(size, size, 0).save(stream, format, **({} if format == "PNG" else {"quality": 92}))
    return stream.getvalue()


def ours(content: bytes, size: int) -> np.ndarray[Any, Any]:
    return decode(content, height=size, width=size, name="x")


def fast_jpeg(content: bytes, size: int) -> np.ndarray[Any, Any]:
    return decode(content, height=size, width=size, name="x", fast_jpeg=True)


def torchvision(content: bytes, size: int) -> np.ndarray[Any, Any]:
    """libjpeg-turbo and torch's antialiased bicubic on uint8."""
    io_module = pytest.importorskip("torchvision.io")
    image = io_module.decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode="RGB")[None]
    scaled = torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("way", [ours, fast_jpeg, torchvision])
@pytest.mark.parametrize(("format", "size", "target"), [("JPEG", 1024, 512), ("JPEG", 1024, 1024), ("WEBP", 1024, 512)])
def test_decode(
    benchmark: Any, way: Callable[[bytes, int], np.ndarray[Any, Any]], format: str, size: int, target: int
) -> None:
    content = stored(size, format)
    image = way(content, target)
    assert image.shape == (target, target, 3)
    error = np.square(image.astype(float) - ours(content, target)).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 25, "not the same picture"
    benchmark(way, content, target)


@pytest.mark.parametrize("kind", ["tar", "parquet, 10 rows a group", "parquet, 100 rows a group"])
def test_random_access_beyond_memory(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One picture of 100 kB, not decoded, from a set of which nothing stays in memory."""
    monkeypatch.setattr("train.data.formats.parquet._KEEP_BYTES", 0)
    body = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for number in range(400):
                for ending, content in (("jpg", body), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    else:
        table = pa.table({"image": [body] * 400, "caption": ["a caption"] * 400})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=int(kind.split()[1]), use_dictionary=False)
    index = open_images(tmp_path)
    rows = iter(np.random.default_rng(1).integers(0, 400, 1_000_000).tolist())
    assert index.row(7).image == body
    benchmark(lambda: index.row(next(rows)))
