"""One row of the data at its sizes: read, filtered, decoded once, scaled, encoded; or the reason why it is dropped."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.buckets import Size, assign, bucket_sizes
from train.data.preparing.filters import Filter
from train.data.preparing.settings import Prepare
from train.data.readers import fitted, turn_of, upright_picture
from train.data.rows import BadSample, ImageIndex
from train.data.sizes import upright_size

REASONS = ("filtered", "unreadable", "no caption", "broken", "too small", "duplicate key", "duplicate picture")
"""Why a row may be missing; in this order a row is looked at, and the first that holds is counted."""


@dataclass(frozen=True)
class Source:
    """One split of one place that pictures come from."""

    name: str
    split: str
    index: ImageIndex
    captions: tuple[str, ...]
    """The caption columns that it has."""
    key: str
    """Column that names a row, "" where it has none."""


@dataclass(frozen=True)
class Made:
    """A picture at one size, encoded."""

    content: bytes
    size: Size


@dataclass
class Outcome:
    """What became of a row."""

    place: str
    """Source, file and row."""
    made: dict[int, Made] = field(default_factory=dict)
    """By side."""
    dropped: dict[int, str] = field(default_factory=dict)
    """Reason by side."""
    detail: str = ""
    """More about a reason, as a sentence."""
    key: str = ""
    """The row's own name, "" where it has none."""
    captions: list[tuple[str, str]] = field(default_factory=list)
    """Column and text of each caption."""
    kept: dict[str, str | None] = field(default_factory=dict)
    digest: bytes = b""
    """BLAKE2b (16 bytes) of the picture as it was stored."""


class Maker:
    """Makes rows as settings say."""

    def __init__(self, settings: Prepare) -> None:
        self.settings = settings
        self._filter = Filter(settings.filter) if settings.filter else None
        self._buckets = {
            side: bucket_sizes(side, side, settings.patch) if settings.buckets else ((side, side),)
            for side in settings.sizes
        }

    def make(self, source: Source, row: int) -> Outcome:
        """One row. Raises UserError for a filter that cannot be worked out, StorageError for a server that is down."""
        sides = self.settings.sizes
        out = Outcome(f"{source.name}: {source.index.key(row)}")
        try:
            raw = source.index.row(row)
        except BadSample as error:
            return _dropped(out, sides, "unreadable", str(error))
        out.key = str(raw.columns.get(source.key) or "") if source.key else ""
        out.captions = _captions(raw.columns, source.captions)
        out.kept = {name: _text(raw.columns.get(name)) for name in self.settings.keep_columns}
        if self._filter is not None and not self._filter.holds(raw.columns, out.place):
            return _dropped(out, sides, "filtered")
        if not out.captions:
            return _dropped(out, sides, "no caption")
        try:
            content = raw.image if isinstance(raw.image, bytes) else Path(raw.image).read_bytes()
        except OSError as error:
            return _dropped(out, sides, "unreadable", f"{raw.image!s}: {error.strerror}")
        out.digest = hashlib.blake2b(content, digest_size=16).digest()
        try:
            self._pictures(out, content)
        except BadSample as error:
            out.made.clear()
            _dropped(out, sides, "broken", str(error))
        return out

    def targets(self, size: Size) -> dict[int, Size]:
        """Of a picture of this height and width: its size by side."""
        picture = np.array([size], np.int32)
        linear = self.settings.fit == "stretch"
        return {
            side: buckets[int(assign(picture, buckets, (side, side), linear=linear)[0])]
            for side, buckets in self._buckets.items()
        }

    def _pictures(self, out: Outcome, content: bytes) -> None:
        size = upright_size(lambda count: content[:count])
        targets = self.targets(size)
        if min(size) > 0:  # else decoding says what is wrong
            for side, target in list(targets.items()):
                if max(target[0] / size[0], target[1] / size[1]) > self.settings.enlarge:
                    out.dropped[side] = "too small"
                    del targets[side]
        if not targets:
            return
        image = upright_picture(content, side=max(map(max, targets.values())), name=out.place)
        for side, target in targets.items():
            if _stays(content, target, self.settings):
                out.made[side] = Made(content, target)
            else:
                scaled = fitted(image, *target, self.settings.fit)
                out.made[side] = Made(encode(scaled, self.settings), target)


def encode(image: Image.Image, settings: Prepare) -> bytes:
    """An RGB picture as the settings say."""
    stream = io.BytesIO()
    if settings.format == "jpeg":
        image.save(stream, "JPEG", quality=settings.quality, subsampling=0 if settings.chroma == "full" else 2)
    elif settings.format == "webp":
        image.save(stream, "WEBP", quality=settings.quality)
    else:
        image.save(stream, "WEBP", lossless=True, quality=20, method=1)  # five times as fast as the default, as small
    return stream.getvalue()


def _stays(content: bytes, size: Size, settings: Prepare) -> bool:
    """Whether a picture is what would be made of it already: encoding it again would only lose quality."""
    wanted = {"jpeg": ("JPEG",), "webp": ("WEBP",), "lossless": ("JPEG", "PNG", "WEBP")}[settings.format]
    with Image.open(io.BytesIO(content)) as image:
        plain = image.format in wanted and image.mode == "RGB" and image.size == (size[1], size[0])
        return plain and not image.has_transparency_data and turn_of(image) is None


def _captions(cells: Mapping[str, Any], columns: Sequence[str]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in columns:
        value = cells.get(name)
        texts = value if isinstance(value, list) else [value]
        found += [(name, text) for text in texts if isinstance(text, str) and text.strip()]
    return found


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _dropped(out: Outcome, sides: Sequence[int], reason: str, detail: str = "") -> Outcome:
    out.dropped, out.detail = dict.fromkeys(sides, reason), detail
    return out
