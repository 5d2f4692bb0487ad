"""Captioned pictures from disk, as examples of one size: decoding, cropping, the choice of a caption, style prefixes.

Whatever the file holds (alpha, palette, 16 bits, CMYK, EXIF rotation, several frames) comes out as upright 8-bit RGB.
"""

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from prx_model.captions import clean_caption
from train.data.buckets import BucketPlan, Size, assign
from train.data.example import Example, Substituted
from train.data.formats.cells import JSON
from train.data.mixture import MixedIndex
from train.data.rows import BadSample, ImageIndex, RawRow, no_column, sha256
from train.data.sampler import index_at
from train.data.sizes import orientation
from train.errors import UserError
from train.randomness import generator

try:
    from simplejpeg import decode_jpeg as _decode_jpeg
except ImportError:  # no wheel for this machine: Pillow gives the same pixels
    _decode_jpeg = None

MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decoded: Pillow's own default, a quarter of a GiB as RGB."""
_SUBSTITUTES = 32
"""Samples that are tried in place of one that cannot be read, before the data are given up."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.32, tag 274: what undoes each orientation."""


class ImageDataset:
    """A deterministic map from a global position to a decoded picture and one of its captions.

    Order, caption and flip depend on (seed, position) only. `len` is the number of rows, so of positions in an epoch;
    positions go on beyond it. With `shuffle=False` a position is the row (modulo the number of rows).

    At each visit one of the row's captions that are not empty is drawn. Where the row's value of `style_column` has an
    entry in `style_prefixes`, the caption becomes "{prefix} {caption}", see `prefixed`. `flip` is the probability of
    mirroring left and right.

    Pictures are height × width; with `buckets`, sizes of train/data/buckets.py, each is the nearest to its own shape,
    which `pictures` tells: (rows, 2), height and width in pixels. `planned` puts those of one size together.
    `fast_jpeg` is `decode`'s.

    Raises UserError for a column that the index lacks, a size below 1 or a flip outside 0 … 1.
    """

    def __init__(
        self,
        index: ImageIndex,
        *,
        height: int,
        width: int,
        seed: int,
        caption_columns: Sequence[str] = ("caption",),
        style_column: str = "",
        style_prefixes: Mapping[str, str] | None = None,
        flip: float = 0.0,
        shuffle: bool = True,
        buckets: Sequence[Size] = (),
        pictures: NDArray[np.int32] | None = None,
        fast_jpeg: bool = False,
        fit: Literal["crop", "stretch"] = "crop",
    ) -> None:
        if height < 1 or width < 1:
            raise UserError(f"height and width must be at least 1 pixel, got {height} and {width}")
        if not 0.0 <= flip <= 1.0:
            raise UserError(f"flip is a probability from 0 to 1, got {flip}")
        if not caption_columns:
            raise UserError("caption_columns is empty; name at least one column that holds captions")
        settings = [("caption_columns", name) for name in caption_columns] + [("style_column", style_column)]
        for setting, name in settings:
            if name not in index.columns and name != "":
                without = "; --data.style-column= does without" if setting == "style_column" else ""
                raise UserError(f"{no_column(index.path, name, setting, index.columns)}{without}")
        self.index, self.height, self.width, self.seed = index, height, width, seed
        self.mixed = index.mixed() if isinstance(index, MixedIndex) else None
        self.caption_columns, self.flip, self.shuffle = tuple(caption_columns), flip, shuffle
        self.fast_jpeg, self.fit = fast_jpeg, fit
        self.style_column, self.style_prefixes = style_column, dict(style_prefixes or {})
        self.sizes, self.bucket_of = [(height, width)], np.zeros(0, np.int16)
        self.fingerprint = index.fingerprint
        if buckets and pictures is not None:
            self.sizes, self.bucket_of = (
                list(buckets),
                assign(pictures, buckets, (height, width), linear=fit == "stretch"),
            )
            shapes = hashlib.sha256(self.bucket_of.tobytes()).hexdigest()
            self.fingerprint = sha256([index.fingerprint, shapes, *(f"{h}x{w}" for h, w in buckets)])
        if fit == "stretch":  # other pixels are other data
            self.fingerprint = sha256([self.fingerprint, fit])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Example:
        """The example at a global position >= 0, or another in its place; see `read` and `Example.substituted`.

        The substitute is drawn from (seed, position) alone, and is scaled to the same size.
        Raises UserError where none of 32 can be read.
        """
        row = self._row(position)
        return self.substituted(position, row, self.size_of(row))

    def read(self, position: int) -> Example:
        """The example at a global position >= 0; its image is (height, width, 3), uint8, RGB, contiguous and writable.

        Raises BadSample, naming file and row, for a picture that cannot be decoded or a row without any caption.
        """
        row = self._row(position)
        return self.example(position, row, self.size_of(row))

    def size_of(self, row: int) -> Size:
        """Height and width that a row's picture is scaled to where it is not in another bucket's batch."""
        return self.sizes[self.bucket_of[row]] if len(self.bucket_of) else (self.height, self.width)

    def planned(self, *, batch: int, first_position: int = 0) -> "PlannedImages":
        """The same pictures in an order in which every `batch` of a stage have one size; see `BucketPlan`."""
        bucket_of = self.bucket_of if len(self.bucket_of) else np.zeros(len(self), np.int16)
        return PlannedImages(
            self,
            BucketPlan(
                bucket_of, self.sizes, batch=batch, seed=self.seed, first_position=first_position, mixed=self.mixed
            ),
        )

    def captions(
        self, missing: Callable[[str], None] = lambda _: None, unread: Callable[[str], None] = lambda _: None
    ) -> Iterator[str]:
        """Every caption that may be drawn, row after row, as it would be drawn; no picture is read.

        Rows without any caption are left out, as training never shows them; `missing` is called with the key of each.
        `unread` is called with a sentence for each text that is there and cannot be read.
        """
        for row in self.index.text_rows():
            for why in dict.fromkeys(row.unread.values()):
                unread(f"{row.key}: {why}")
            try:
                yield from self._captions(row)
            except BadSample:
                missing(row.key)

    def substituted(self, position: int, row: int, size: Size, candidates: NDArray[Any] | None = None) -> Example:
        """A row at a size, or the first readable one of up to 32 drawn from the candidates (all unless given)."""
        try:
            return self.example(position, row, size)
        except BadSample as error:
            first = error
        key = self.index.key(row)
        reason = str(first).removeprefix(f"{self.index.path}: ").removeprefix(f"{key}: ")
        rng = generator(self.seed, purpose="substitute", position=position)
        count = len(self.index) if candidates is None else len(candidates)
        for _ in range(_SUBSTITUTES):
            drawn = int(rng.random() * count)
            try:
                example = self.example(position, drawn if candidates is None else int(candidates[drawn]), size)
                return replace(example, substituted=Substituted(position, key, reason))
            except BadSample:
                continue
        raise UserError(f"{_SUBSTITUTES + 1} samples in a row cannot be read; the first: {first}")

    def _row(self, position: int) -> int:
        size = len(self.index)
        return index_at(position, size=size, seed=self.seed) if self.shuffle else position % size

    def example(self, position: int, number: int, size: Size) -> Example:
        """Row `number` at a size, with the caption and flip of a position. Raises BadSample."""
        row = self.index.row(number)
        # Before the picture, which costs more.
        caption = self._caption(row, position)
        name = f"{self.index.path}: {row.key}"
        image = decode(row.image, height=size[0], width=size[1], name=name, fast_jpeg=self.fast_jpeg, fit=self.fit)
        if self.flip and generator(self.seed, purpose="flip", position=position).random() < self.flip:
            image = np.ascontiguousarray(image[:, ::-1])
        source = self.index.source_of(number) if isinstance(self.index, MixedIndex) else None
        return Example(image, caption, row.key, source=source)

    def _caption(self, row: RawRow, position: int) -> str:
        captions = self._captions(row)
        if len(captions) == 1:
            return captions[0]
        return captions[int(generator(self.seed, purpose="caption", position=position).random() * len(captions))]

    def _captions(self, row: RawRow) -> list[str]:
        """The row's captions of which cleaning leaves something, as they are stored, with its style before each."""
        cells = [row.columns.get(name) for name in self.caption_columns]
        listed = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
        captions = [text.strip() for text in listed if isinstance(text, str) and clean_caption(text)]
        if not captions:
            found = (row.unread.get(name) for name in (*self.caption_columns, JSON))
            unread = "; ".join(dict.fromkeys(why for why in found if why))
            advice = (
                f": {unread}" if unread else "; write one, remove the row, or name another column in caption_columns"
            )
            raise BadSample(f"{self.index.path}: {row.key}: no caption in {', '.join(self.caption_columns)}{advice}")
        prefix = self.style_prefixes.get(str(row.columns.get(self.style_column))) if self.style_column else None
        return [prefixed(caption, prefix) for caption in captions] if prefix else captions


class PlannedImages:
    """Pictures in the order of a `BucketPlan`: positions of one step give one size."""

    def __init__(self, images: ImageDataset, plan: BucketPlan) -> None:
        self.images, self.plan = images, plan

    def __getitem__(self, position: int) -> Example:
        """As `ImageDataset.__getitem__`; a substitute comes from the same bucket and source."""
        place = self.plan.at(position)
        return self.images.substituted(position, place.row, place.size, self.plan.substitutes(place))


def decode(
    source: bytes | Path,
    *,
    height: int,
    width: int,
    name: str,
    fast_jpeg: bool = False,
    fit: Literal["crop", "stretch"] = "crop",
) -> NDArray[np.uint8]:
    """Decode a picture file, scale it (Lanczos) until it covers height × width, and cut out the centre.

    With `fit` "stretch" nothing is cut: the whole picture is scaled to height × width.

    Returns (height, width, 3), uint8, sRGB as stored (embedded colour profiles are not applied); transparent parts are
    white, EXIF rotation is undone, of several frames the first is taken. A picture of the exact size is not resampled.

    A JPEG of four times the size and more is shrunk by its decoder first; with `fast_jpeg` from twice the size on,
    which is about a mean of 2 × 2 pixels: 1024 to 512 is 33 dB (peak) from Lanczos, at 3 to 5 times the speed.

    Raises BadSample, beginning with `name`, for a file that is no picture, is truncated, has over MAX_PIXELS pixels, or
    holds 32-bit floats.
    """

    def exact(image: Image.Image) -> NDArray[np.uint8] | None:
        return _exact_jpeg(image, source, height, width)

    with _sentences(name, source):
        found = _load(source, max(height, width), fast_jpeg, exact)
        return found if isinstance(found, np.ndarray) else np.array(fitted(found, height, width, fit))


def upright_picture(source: bytes | Path, *, side: int, name: str) -> Image.Image:
    """Decode a picture file as `decode` does, upright and RGB, but for a JPEG of over four times `side` at full size.

    Raises BadSample as `decode` does.
    """
    with _sentences(name, source):
        found = _load(source, side, False, lambda _: None)
        assert isinstance(found, Image.Image)
        return found


def fitted(image: Image.Image, height: int, width: int, fit: Literal["crop", "stretch"]) -> Image.Image:
    """An upright RGB picture at height × width, see `decode`."""
    return (_cover if fit == "crop" else _stretch)(image, height, width)


def _load(
    source: bytes | Path,
    side: int,
    fast_jpeg: bool,
    exact: Callable[[Image.Image], NDArray[np.uint8] | None],
) -> Image.Image | NDArray[np.uint8]:
    """The upright RGB picture, or what `exact` makes of the opened file."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} × {image.height} pixels")
        if image.format == "EPS":
            raise ValueError("EPS, which is a program to run rather than a picture")
        if (found := exact(image)) is not None:
            return found
        # An EXIF rotation may swap the axes, so the long side of the target is asked for on both.
        covering = side / min(image.size)
        covering *= 1 if fast_jpeg else 2
        # JPEG only, elsewhere it does nothing: decode at 1/2, 1/4 or 1/8, still this much larger than needed.
        image.draft(None, (math.ceil(covering * image.width), math.ceil(covering * image.height)))
        turn = turn_of(image)
        image.load()
        return _rgb(image if turn is None else image.transpose(turn))


def _exact_jpeg(image: Image.Image, source: bytes | Path, height: int, width: int) -> NDArray[np.uint8] | None:
    """A JPEG of just this size by simplejpeg, or None: its pixels are Pillow's, bit for bit, in two thirds of the time.

    Prepared shards hold such pictures alone (train/README.md has the table).
    """
    if _decode_jpeg is None or image.format != "JPEG" or image.mode != "RGB" or image.size != (width, height):
        return None
    if not isinstance(source, bytes) or turn_of(image) is not None:
        return None
    try:
        found: NDArray[np.uint8] = _decode_jpeg(source)
        return found
    except ValueError:  # Damage, of which Pillow reads more.
        return None


@contextmanager
def _sentences(name: str, source: bytes | Path) -> Iterator[None]:
    """Within this context what a decoder stumbles on is a BadSample that begins with `name`."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(
            f"{name}: the picture is too large ({error}; the limit is {MAX_PIXELS:,} pixels); "
            "scale it down or remove the row"
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever they stumble on: OSError, SyntaxError, struct.error, …
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = _unknown(source) if isinstance(error, UnidentifiedImageError) else what
        raise BadSample(f"{name}: the picture cannot be decoded ({what}); replace it or remove the row") from error


def _unknown(source: bytes | Path) -> str:
    """What a file is that Pillow does not know, by its first bytes (ISO 14496-12, section 4.3; ISO 18181-2)."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            source = file.read(16)
    if source[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "HEIC, which needs pillow-heif to be installed"
    if source.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL, which needs pillow-jxl-plugin to be installed"
    return "no known picture format"


def prefixed(caption: str, prefix: str) -> str:
    """Put a style before a caption: ("A snowman.", "flat icon of") gives "flat icon of a snowman".

    The first letter becomes small, but for words in capitals ("COOL button"), and a full stop at the end goes.
    """
    caption = caption.removesuffix(".")
    return f"{prefix} {caption if caption[1:2].isupper() else caption[:1].lower() + caption[1:]}"


def parse_prefixes(entries: Iterable[str]) -> dict[str, str]:
    """("noto-emoji=flat icon of", …) as {"noto-emoji": "flat icon of", …}.

    Raises UserError for an entry without "=", with nothing on one side of it, or for a value named twice.
    """
    prefixes: dict[str, str] = {}
    for entry in entries:
        value, equals, prefix = (part.strip() for part in entry.partition("="))
        if not (value and equals and prefix):
            raise UserError(f"style prefix {entry!r} is not of the form value=prefix, as in 'noto-emoji=flat icon of'")
        if value in prefixes:
            raise UserError(f"two style prefixes for {value!r}: {prefixes[value]!r} and {prefix!r}; keep one")
        prefixes[value] = prefix
    return prefixes


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes an opened picture upright, if anything; asked before its pixels are decoded."""
    return _UPRIGHT.get(orientation(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit floats, whose range is not known; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255; 65535 / 255 = 257.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # Before resampling, which would else let the hidden colours of transparent pixels bleed in.
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale and centre crop in one resampling: only the part of the target's aspect ratio is read."""
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    # Rounding may put edges a hair outside, which Pillow refuses; the far ones likewise below.
    left, top = max((image.width - scale * width) / 2, 0), max((image.height - scale * height) / 2, 0)
    if scale == 1:
        return image.crop((int(left), int(top), int(left) + width, int(top) + height))
    box = (left, top, min(left + scale * width, image.width), min(top + scale * height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _stretch(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale the whole picture, whatever becomes of its shape."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
