"""Samples of MDS shards (Mosaic Data Shard, version 2) on a disk or behind http(s), uncompressed or zstd; read only.

A folder has `index.json`, which lists the shards with their columns, and the shards. A shard is, in little endian:
samples (uint32), samples + 1 places from the file's beginning (uint32), a description that is not needed, the samples.
A sample is the lengths of those columns that have no fixed one (uint32 each), then the columns' bytes in their order.
(https://docs.mosaicml.com/projects/streaming, "Dataset Format".) Pickles, which MDS knows too, are never read.
"""

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from train.data.formats.mds_cells import IMAGES, SCALARS, cell_of, picture_of, picture_size
from train.data.formats.storage import Storage, is_url
from train.data.formats.storage_errors import MissingFile
from train.data.rows import (
    Account,
    BadSample,
    RawRow,
    check_captions,
    listing,
    no_column,
    no_split,
    sha256,
    short,
    size_of_cells,
    split_in_path,
)
from train.errors import UserError
from train.shown import address
from train.side_files import parse_json

INDEX = "index.json"
_LARGEST_INDEX = 1 << 30
_LARGEST_SAMPLE = 1 << 30
"""Bytes of a sample, which is read whole."""
_LARGEST_SHARD = 1 << 32
"""Places in a shard have 32 bits."""
_KEEP_BYTES = 1 << 30
"""Unpacked shards stay in memory up to this size; those not used for longest go first."""
_SHARDS_AT_ONCE = 8


@dataclass(frozen=True)
class _Shard:
    """What index.json says about a shard, checked."""

    name: str
    """Inside the index's path."""
    file: Path | str
    packed: bool
    size: int
    """Bytes, unpacked."""
    samples: int
    columns: tuple[tuple[str, str, int | None], ...]
    """Name, encoding, and length in bytes where it is fixed."""


class MdsIndex:
    """Samples of MDS shards. A set compressed by zstd unpacks a whole shard for a picture: prepare it first."""

    def __init__(
        self,
        path: Path | str,
        files: Mapping[str, Path | str],
        storage: Storage,
        image_column: str,
        captions: Sequence[str],
        split: str,
        some_captions: bool = False,
    ):
        """`files` are the readable places of index.json files by their names inside `path`.

        Raises UserError where none can be read, or a column is missing; NoSplitError; StorageError.
        """
        self.path, self._image, self._storage = path, image_column, storage
        named = {name: file for name, file in files.items() if split_in_path(Path(name).parent / "x")}
        chosen = {
            name: file
            for name, file in (named or files).items()
            if (split_in_path(Path(name).parent / "x") or "train") == split
        }
        if not chosen:
            raise no_split(path, split, (named or files).keys())
        problems: list[str] = []
        self._shards: list[_Shard] = []
        described = [f"mds {split}"]
        for name, file in chosen.items():
            content = _index(file, storage)
            described += [f"{name} {sha256([content.decode(errors='surrogateescape')])}"]
            self._shards += _shards(name, file, content, storage, problems)
        self._shards = [shard for shard in self._shards if shard.samples]
        if not self._shards:
            nothing = f"{path} has no sample, among {listing(chosen)}"
            raise UserError(problems[0].removesuffix("; it is left out") if problems else nothing)
        self.problems = tuple(problems)
        self.columns = _columns(self._shards, image_column, captions, some_captions)
        self.fingerprint = sha256([*described, *(f"{s.name} {s.samples}" for s in self._shards)])
        self._firsts = np.cumsum([0, *(shard.samples for shard in self._shards)])
        self.account = Account("rows", len(self), len(self), len(self), {})
        self._unpacked: _Unpacked | None = None

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        key, (shard, number) = self.key(index), self._place(index)
        try:
            read = self._reader(shard)
            found = {name: read(*span) for name, span in _spans(shard, number, read).items() if name in self._wanted()}
            encodings = {name: encoding for name, encoding, _ in shard.columns}
            image = picture_of(encodings[self._image], found[self._image])
        except (ValueError, MissingFile) as error:
            raise BadSample(f"{self.path}: {key}: cannot be read ({short(error)}); copy the shard again") from None
        cells = {name: cell_of(encodings[name], found[name]) if name in found else None for name in self.columns}
        named = f"{key} ({cells['key']})" if cells.get("key") not in (None, "") else key
        return RawRow(image, cells, named)

    def key(self, index: int) -> str:
        """See ImageIndex."""
        shard, number = self._place(index)
        return f"{shard.name} row {number}"

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for shard in self._shards:
            for number, cells in self._cells(shard, self.columns):
                if cells is not None:
                    yield RawRow(b"", cells, f"{shard.name} row {number}")

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """See ImageIndex."""
        told = width in self.columns and height in self.columns

        def of_shard(shard: _Shard) -> list[tuple[int, int]]:
            if told:
                both = self._cells(shard, (width, height))
                return [size_of_cells(cells or {}, width, height) for _, cells in both]
            return list(self._picture_sizes(shard))

        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            parts = [np.array(part, np.int32).reshape(-1, 2) for part in pool.map(of_shard, self._shards)]
        return np.concatenate(parts)

    def _wanted(self) -> set[str]:
        return {self._image, *self.columns}

    def _place(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._shards[shard], index - int(self._firsts[shard])

    def _cells(self, shard: _Shard, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Number and cells of each sample of a shard; None for one that cannot be read."""
        encodings = {name: encoding for name, encoding, _ in shard.columns}
        for number in range(shard.samples):
            try:
                read = self._reader(shard)
                spans = _spans(shard, number, read)
                yield (
                    number,
                    {n: cell_of(encodings[n], read(*spans[n])) if n in spans else None for n in columns},
                )
            except (ValueError, MissingFile):
                yield number, None

    def _picture_sizes(self, shard: _Shard) -> Iterator[tuple[int, int]]:
        """Height and width of each picture of a shard, from its head."""
        encodings = {name: encoding for name, encoding, _ in shard.columns}
        for number in range(shard.samples):
            try:
                read = self._reader(shard)
                at, length = _spans(shard, number, read)[self._image]
                yield picture_size(
                    encodings[self._image],
                    lambda count, at=at, length=length, read=read: read(at, min(count, length)),  # type: ignore[misc]
                )
            except (ValueError, MissingFile):
                yield 0, 0

    def _reader(self, shard: _Shard) -> Callable[[int, int], bytes]:
        """What reads so many bytes from a place of an unpacked shard. Raises ValueError where it cannot be unpacked."""
        if not shard.packed:
            return lambda start, length: _whole(self._storage.read(shard.file, start, length), length)
        if self._unpacked is None or self._unpacked.pid != os.getpid():
            self._unpacked = _Unpacked(self._storage)
        content = self._unpacked.of(shard)
        return lambda start, length: _whole(content[start : start + length], length)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": None}


class _Unpacked:
    """Compressed shards, unpacked; one a process."""

    def __init__(self, storage: Storage) -> None:
        self.pid, self._storage, self._lock = os.getpid(), storage, threading.Lock()
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def of(self, shard: _Shard) -> bytes:
        with self._lock:
            if shard.name not in self._held:
                self._held[shard.name] = self._unpack(shard)
                while len(self._held) > 1 and sum(map(len, self._held.values())) > _KEEP_BYTES:
                    self._held.popitem(last=False)
            self._held.move_to_end(shard.name)
            return self._held[shard.name]

    def _unpack(self, shard: _Shard) -> bytes:
        packed = self._storage.read(shard.file, 0, self._storage.size(shard.file))
        try:
            # By a stream, so that memory follows what is really there, not what the index claims.
            content: bytes = pa.CompressedInputStream(pa.BufferReader(packed), "zstd").read(shard.size + 1)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"its shard cannot be unpacked: {short(error)}") from None
        if len(content) != shard.size:
            raise ValueError(f"its shard unpacks to other than the {shard.size:,} bytes that {INDEX} says")
        return content


def _spans(shard: _Shard, number: int, read: Callable[[int, int], bytes]) -> dict[str, tuple[int, int]]:
    """First byte and length of each column of a sample. Raises ValueError for places outside of it."""
    begin, end = struct.unpack("<2I", read(4 + 4 * number, 8))
    first = 4 + 4 * (shard.samples + 1)
    if not first <= begin <= end <= shard.size:
        raise ValueError(f"it stands at bytes {begin:,} to {end:,}, outside of {first:,} to {shard.size:,}")
    if end - begin > _LARGEST_SAMPLE:
        raise ValueError(f"it has {end - begin:,} bytes, over 1 GiB")
    varying = sum(size is None for _, _, size in shard.columns)
    if 4 * varying > end - begin:
        raise ValueError(f"it has {end - begin:,} bytes, too few for its {varying} lengths")
    lengths = iter(struct.unpack(f"<{varying}I", read(begin, 4 * varying)))
    at, spans = begin + 4 * varying, dict[str, tuple[int, int]]()
    for name, _, size in shard.columns:
        length = next(lengths) if size is None else size
        spans[name] = (at, length)
        at += length
    if at != end:
        raise ValueError(f"its columns take {at - begin:,} bytes of its {end - begin:,}")
    return spans


def _whole(content: bytes, length: int) -> bytes:
    if len(content) != length:
        raise ValueError("the shard is cut off")
    return content


def _index(file: Path | str, storage: Storage) -> bytes:
    size = storage.size(file)
    if size > _LARGEST_INDEX:
        raise UserError(f"{address(file)} has {size:,} bytes, over 1 GiB, which no list of shards has")
    return storage.read(file, 0, size)


def _shards(name: str, file: Path | str, content: bytes, storage: Storage, problems: list[str]) -> Iterator[_Shard]:
    """The readable shards that an index.json lists; what is wrong with the others is added to `problems`."""
    try:
        told = parse_json(content)
        listed = list(told["shards"])
    except (ValueError, KeyError, TypeError):
        problems.append(f'{address(file)} is no list of MDS shards ({{"shards": […]}}); it is left out')
        return
    for number, entry in enumerate(listed):
        try:
            yield _checked(name, file, entry, storage)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"lacks {error}" if isinstance(error, KeyError) else short(error)
            said = said if isinstance(error, ValueError | KeyError) else "is no description of a shard"
            problems.append(f"{address(file)}: shard {number} {said}; it is left out")
        except MissingFile as error:
            problems.append(f"{error}; it is left out")


def _checked(name: str, file: Path | str, entry: Mapping[str, Any], storage: Storage) -> _Shard:
    """A shard of an index.json. Raises ValueError, KeyError and TypeError for what is none; MissingFile."""
    if (entry["format"], entry["version"]) != ("mds", 2):
        raise ValueError(f"has format {entry['format']!r}, version {entry['version']!r}; MDS of version 2 is read")
    listed = [entry["column_names"], entry["column_encodings"], entry["column_sizes"]]
    if len(set(map(len, listed))) > 1:
        raise ValueError(f"has {', '.join(str(len(one)) for one in listed)} names, encodings and sizes of columns")
    columns = list(zip(*listed, strict=True))
    for column, encoding, size in columns:
        fixed = size is None or (isinstance(size, int) and not isinstance(size, bool) and 0 < size <= _LARGEST_SAMPLE)
        if not (isinstance(column, str) and isinstance(encoding, str) and fixed):
            raise ValueError(f"has a column {column!r} of encoding {encoding!r} and {size!r} bytes")
    if len({column for column, _, _ in columns}) < len(columns):
        raise ValueError("has two columns of one name")
    samples, raw, packed = entry["samples"], entry["raw_data"], entry.get("zip_data")
    size = raw["bytes"]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST_SHARD for n in (samples, size)):
        raise ValueError(f"has {samples!r} samples and {size!r} bytes")
    if 4 + 4 * (samples + 1) > size:
        raise ValueError(f"has {size:,} bytes, too few for the places of {samples:,} samples")
    whole = _beside(file, raw["basename"])
    if packed is None or _size(whole, storage) is not None:
        place, there = whole, storage.size(whole)
        if there != size:
            raise ValueError(f"is {address(place)}, which has {there:,} bytes instead of {size:,}")
    else:
        kind = str(entry.get("compression")).partition(":")[0]
        if kind != "zstd":
            raise ValueError(f"is compressed by {kind}; zstd is read, or unpacked shards")
        place = _beside(file, packed["basename"])
        storage.size(place)
    folder = PurePosixPath(name).parent
    return _Shard((folder / raw["basename"]).as_posix(), place, place is not whole, size, samples, tuple(columns))


def _beside(file: Path | str, name: object) -> Path | str:
    """A shard's place beside its index.json. Raises ValueError for a name that leads out of the folder."""
    if not isinstance(name, str) or not name or "\\" in name or PurePosixPath(name).is_absolute():
        raise ValueError(f"has the name {name!r}")
    if any(part in ("..", "") for part in name.split("/")) or "\0" in name:
        raise ValueError(f"has the name {name!r}, which leads out of its folder")
    if not is_url(file):
        return Path(file).parent / name
    head, mark, query = str(file).partition("?")
    return f"{head.rpartition('/')[0]}/{name}{mark}{query}"


def _size(file: Path | str, storage: Storage) -> int | None:
    try:
        return storage.size(file)
    except MissingFile:
        return None


def _columns(
    shards: Sequence[_Shard], image_column: str, captions: Sequence[str], some_captions: bool
) -> tuple[str, ...]:
    """Names of the columns that are cells. Raises UserError for one that is asked for and not there."""
    columns = dict[str, None]()
    for shard in shards:
        encodings = {name: encoding for name, encoding, _ in shard.columns}
        where = address(shard.file)
        asked = [name for name in captions if name in encodings or not some_captions]
        for name, setting in ((image_column, "image_column"), *((name, "caption_columns") for name in asked)):
            if name not in encodings:
                raise no_column(where, name, setting, encodings)
            kind = encodings[name].partition(":")[0]
            if setting == "image_column" and kind not in IMAGES:
                raise UserError(f"{where}: column {name!r} (image_column) holds {kind}, not pictures")
            if setting == "caption_columns" and kind != "str":
                raise UserError(f"{where}: column {name!r} (caption_columns) holds {kind}, not text")
        columns |= dict.fromkeys(name for name, kind in encodings.items() if kind in SCALARS)
    check_captions(address(shards[0].file), captions, columns, some=some_captions)
    return tuple(columns)
