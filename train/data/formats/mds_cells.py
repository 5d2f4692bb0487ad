"""What the bytes of an MDS column mean, by the name of its encoding."""

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from train.data.sizes import upright_size

IMAGES = {"bytes", "jpeg", "png", "pil"}
"""Encodings of pictures: files as they are, and Pillow's pixels."""
_NUMBERS = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16")}
_NUMBERS |= {name: np.dtype(name).newbyteorder("<") for name in ("int32", "int64", "float16", "float32", "float64")}
_NUMBERS["int"] = _NUMBERS["int64"]
_TEXTS: dict[str, Callable[[str], Any]] = {"str": str, "str_int": int, "str_float": float, "str_decimal": float}
SCALARS = {*_NUMBERS, *_TEXTS}
"""Encodings of text and numbers; arrays and JSON are no cells, and pickles are never read."""
_LONGEST_NUMBER = 1_000
_NETPBM = {"RGB": (b"P6", 3), "L": (b"P5", 1)}
"""Pillow's modes whose bytes are those of a file by Netpbm: its magic number and bytes a pixel."""


def cell_of(encoding: str, content: bytes) -> Any:
    """Value of a scalar's bytes; None where they are no value of it (text that is no UTF-8)."""
    if encoding in _NUMBERS:
        kind = _NUMBERS[encoding]
        return np.frombuffer(content, kind)[0].item() if len(content) == kind.itemsize else None
    try:
        text = content.decode()
        return _TEXTS[encoding](text) if encoding == "str" or len(text) <= _LONGEST_NUMBER else None
    except (ValueError, OverflowError, KeyError):
        return None


def picture_of(encoding: str, content: bytes) -> bytes:
    """A picture's bytes as a file. Raises ValueError for pixels that do not fit their own description."""
    if encoding.partition(":")[0] != "pil":
        return content
    height, width, mode, start = _pil(content)
    if mode in _NETPBM:
        magic, channels = _NETPBM[mode]
        if len(content) - start != height * width * channels:
            raise ValueError(f"{len(content) - start:,} bytes are no {width} x {height} pixels of {mode}")
        return b"%s %d %d 255\n" % (magic, width, height) + content[start:]
    try:
        stream = io.BytesIO()
        Image.frombytes(mode, (width, height), content[start:]).save(stream, "PNG", compress_level=1)
        return stream.getvalue()
    except Exception as error:  # of Pillow, whatever it is
        raise ValueError(f"{width} x {height} pixels of {mode} cannot be read: {error}") from None


def picture_size(encoding: str, read: Callable[[int], bytes]) -> tuple[int, int]:
    """Height and width of a picture, see `upright_size`."""
    if encoding.partition(":")[0] != "pil":
        return upright_size(read)
    height, width, _, _ = _pil(read(64))
    return height, width


def _pil(content: bytes) -> tuple[int, int, str, int]:
    """Height, width, mode and the first byte of the pixels."""
    if len(content) < 12:
        raise ValueError("pixels without their size")
    width, height, length = struct.unpack("<3I", content[:12])
    if not (0 < width < 2**31 and 0 < height < 2**31 and 0 < length <= 16):
        raise ValueError(f"pixels of {width} x {height} with a mode of {length} letters")
    return height, width, content[12 : 12 + length].decode("ascii", errors="replace"), 12 + length
