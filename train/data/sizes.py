"""Height and width of pictures from the first bytes of their files, without decoding them."""

import importlib
import importlib.util
import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from PIL import Image

HEAD_BYTES = 1 << 16
"""Where the size usually stands, behind a camera's preview at most; a picture that hides it deeper is read whole."""
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
"""EXIF 2.32, tag 274, and its values that swap height and width."""
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_jxl": ""}
"""Packages that teach Pillow HEIC and JPEG XL where they are installed, and what of them is to be called."""
_EXIF_OF_PNG = {"exif", "xmp", "Raw profile type exif"}

T = TypeVar("T")


def _take_plugins() -> None:
    for name, function in _PLUGINS.items():
        if importlib.util.find_spec(name) is not None:
            plugin = importlib.import_module(name)
            if function:
                getattr(plugin, function)()


_take_plugins()  # in every process that reads pictures: each imports this file


def orientation(image: Image.Image) -> int:
    """How an opened picture must still be turned to stand upright, as EXIF 2.32, tag 274 has it: 1 … 8, 1 for not.

    Sizes and decoding both ask here, before pixels are decoded, so they agree for every format. EXIF (or XMP) of a PNG
    counts where it stands before the pixels, as in browsers: looking behind them would cost reading the whole file.
    """
    if image.format == "TIFF":  # Pillow turns those itself, and tells their size so
        return 1
    if image.format == "PNG" and not _EXIF_OF_PNG & image.info.keys():
        return 1  # asked for EXIF, Pillow would decode the pixels to look behind them
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels; Pillow raises whatever it stumbles on
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright_size(read: Callable[[int], bytes]) -> tuple[int, int]:
    """Height and width of a picture after its EXIF rotation; 0 and 0 where no picture can be recognised.

    `read(n)` gives the first n bytes of the file, or all where there are fewer.
    """
    for count in (HEAD_BYTES, 1 << 40):
        head = read(count)
        try:
            with Image.open(io.BytesIO(head)) as image:
                width, height = image.size
                return (width, height) if orientation(image) in _TURNED else (height, width)
        except Exception:  # Pillow's plugins raise whatever they stumble on
            if len(head) < count:
                return 0, 0
    return 0, 0


def size_of_file(file: Path) -> tuple[int, int]:
    """As `upright_size`, of a picture file; 0 and 0 where it cannot be read."""

    def read(count: int) -> bytes:
        with file.open("rb") as opened:
            return opened.read(count if count <= HEAD_BYTES else -1)

    try:
        return upright_size(read)
    except (OSError, ValueError):  # a name with a zero byte in it is a ValueError
        return 0, 0


def side_by_side(function: Callable[[T], tuple[int, int]], items: Iterator[T]) -> Iterator[tuple[int, int]]:
    """Sizes of many pictures in their order: threads hide the time that a disk or a network takes to answer."""
    with ThreadPoolExecutor(16) as pool:
        waiting: deque[Future[tuple[int, int]]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 256:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, of which the next is made by a thread while one is worked with."""
    with ThreadPoolExecutor(1) as pool:
        end = object()
        waiting: Future[object] = pool.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, items, end)
            yield cast(T, item)
