"""Samples of WebDataset tar files on a disk or behind http(s), each read by one access to its place in the file.

The files of a sample stand behind one another and share their name up to the first dot of its last part
(https://github.com/webdataset/webdataset): "00/17.jpg", "00/17.txt", "00/17.json" are sample "00/17".
"""

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from train.data.formats.cells import JSON, Cells, cells_of
from train.data.formats.storage import MissingFile, Storage, is_url
from train.data.rows import (
    BadSample,
    RawRow,
    listing,
    no_column,
    no_split,
    sha256,
    short,
    size_of_cells,
    split_in_path,
)
from train.data.sizes import upright_size
from train.errors import UserError
from train.shown import address

PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "jfif")
"""Last parts of the endings that pictures have."""
_BLOCK = 512
_FIRST_SAMPLES = 32
"""Samples of the first shard whose text files and JSON fields say which columns there are."""
_SHARDS_AT_ONCE = 8
_LARGEST_HEADER = 1 << 20
"""Bytes of a long name or of extended attributes in a tar file."""
_LARGEST_SAMPLE = 1 << 30
"""Bytes of a sample, which is read whole."""


@dataclass
class _Sample:
    """Consecutive members of one name: where they stand in the tar file, in bytes."""

    key: str
    start: int
    end: int
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First byte and length of each by its ending."""


class _DamagedTar(Exception):
    """The rest of a tar file cannot be read."""


class TarIndex:
    """Samples with a picture in tar files; an opened index holds 12 bytes a sample."""

    def __init__(
        self,
        path: Path | str,
        files: Mapping[str, Path | str],
        storage: Storage,
        image_column: str,
        captions: Sequence[str],
        split: str,
        cache: Path | None = None,
    ):
        """`files` are the readable places of files by their names inside `path`.

        Raises UserError where none can be read, or a caption's column is nowhere; NoSplitError; StorageError.
        """
        self.path, self._image, self._storage = path, image_column, storage
        named = {name: file for name, file in files.items() if split_in_path(Path(name))}
        alone = len(files) == 1 and str(path) == address(next(iter(files.values()))) and split == "train"
        wanted = {n: f for n, f in (named or files).items() if alone or (split_in_path(Path(n)) or "train") == split}
        if not wanted:
            raise no_split(path, split, (named or files).keys())
        scans = self._scan_all(list(wanted.values()), cache)
        self.problems = tuple(problem for _, problem in scans if problem)
        good = [(n, f, spans) for (n, f), (spans, _) in zip(wanted.items(), scans, strict=True) if len(spans)]
        if not good:
            nothing = f"{path} has no sample with a picture, among {listing(wanted)}"
            raise UserError(self.problems[0].removesuffix("; it is left out") if self.problems else nothing)
        self._names, self._files = [name for name, _, _ in good], [file for _, file, _ in good]
        self._firsts = np.cumsum([0, *(len(spans) for _, _, spans in good)])
        self._starts: NDArray[np.int64] = np.concatenate([spans[:, 0] for _, _, spans in good])
        self._lengths: NDArray[np.uint32] = np.concatenate([spans[:, 1] for _, _, spans in good]).astype(np.uint32)
        self.fingerprint = sha256(
            [f"tar {split}", *(f"{name} {storage.size(file)} {len(spans)}" for name, file, spans in good)]
        )
        columns = dict[str, None]()
        nested: dict[str, str] = {}
        for _, cells in islice(self._texts(0), _FIRST_SAMPLES):
            columns.update(dict.fromkeys(n for n in (*cells.values, *cells.unread) if n != JSON))
            nested |= cells.nested
        self.columns = tuple(columns)
        for name in captions:
            if name not in columns:
                raise no_column(address(self._files[0]), name, "caption_columns", columns, nested)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        key, (shard, _) = self.key(index), self._place(index)
        start, length = int(self._starts[index]), int(self._lengths[index])
        span = self._storage.read(self._files[shard], start, length)
        try:
            if len(span) < length:
                raise _DamagedTar("the file has become shorter")
            sample = next(_samples(io.BytesIO(span + bytes(-length % _BLOCK)), length + -length % _BLOCK))
        except (_DamagedTar, StopIteration) as error:
            raise BadSample(f"{self.path}: {key}: cannot be read ({short(error)}); copy the file again") from None
        begin, size = sample.members[_picture(sample, self._image) or ""]
        cells = cells_of(sample.members, lambda at, count: span[at : at + count])
        return RawRow(
            span[begin : begin + size],
            {name: cells.values.get(name) for name in self.columns},
            f"{key} ({sample.key})",
            cells.unread,
        )

    def key(self, index: int) -> str:
        """See ImageIndex."""
        shard, number = self._place(index)
        return f"{self._names[shard]} row {number}"

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for shard, name in enumerate(self._names):
            for number, (_, cells) in enumerate(self._texts(shard)):
                row = {name: cells.values.get(name) for name in self.columns}
                yield RawRow(b"", row, f"{name} row {number}", cells.unread)

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """See ImageIndex."""
        told = width in self.columns and height in self.columns

        def of_shard(shard: int) -> list[tuple[int, int]]:
            if told:
                return [size_of_cells(cells.values, width, height) for _, cells in self._texts(shard)]
            found = []
            with self._storage.open(self._files[shard]) as file:
                for sample in self._rows(shard, file):
                    begin, size = sample.members[_picture(sample, self._image) or ""]
                    found.append(upright_size(lambda count, at=begin, size=size: _at(file, at, min(count, size))))  # type: ignore[misc]
            return found

        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            parts = [np.array(part, np.int32).reshape(-1, 2) for part in pool.map(of_shard, range(len(self._files)))]
        return np.concatenate(parts)

    def _place(self, index: int) -> tuple[int, int]:
        """Shard, and the sample's number in it."""
        if not 0 <= index < len(self._starts):
            raise IndexError(f"row {index} of {len(self._starts)}")
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return shard, index - int(self._firsts[shard])

    def _rows(self, shard: int, file: BinaryIO) -> Iterator[_Sample]:
        """The samples of a shard that are rows of this index."""
        known = self._starts[self._firsts[shard] : self._firsts[shard + 1]]
        number = 0
        for sample in _readable(file, self._storage.size(self._files[shard])):
            if number < len(known) and sample.start == known[number]:
                number += 1
                yield sample

    def _texts(self, shard: int) -> Iterator[tuple[_Sample, Cells]]:
        """The samples of a shard with the content of their text files; pictures are jumped over."""
        with self._storage.open(self._files[shard]) as file:
            for sample in self._rows(shard, file):
                yield sample, cells_of(sample.members, lambda at, count: _at(file, at, count))

    def _scan_all(self, files: Sequence[Path | str], cache: Path | None) -> list[tuple[NDArray[np.int64], str]]:
        """Of each shard: start and length of its samples, (n, 2), and what is wrong with it, if anything."""
        order = list(range(len(files)))
        # Processes that share a cache read different shards first, and find the others' work when they come to it.
        random.Random(os.getpid()).shuffle(order)
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            found = dict(zip(order, pool.map(lambda n: self._scan(files[n], cache), order), strict=True))
        return [found[number] for number in range(len(files))]

    def _scan(self, file: Path | str, cache: Path | None) -> tuple[NDArray[np.int64], str]:
        try:
            kept = _cache_file(cache, file, self._storage, self._image) if cache else None
            if kept is not None and kept.exists():
                with np.load(kept, allow_pickle=False) as loaded:
                    return loaded["spans"], str(loaded["problem"])
            spans, problem = _scan_shard(file, self._storage, self._image)
        except MissingFile as error:
            return np.zeros((0, 2), np.int64), f"{error}; it is left out"
        if kept is not None:
            _write_cache(kept, spans, problem)
        return spans, problem


def _scan_shard(file: Path | str, storage: Storage, image_column: str) -> tuple[NDArray[np.int64], str]:
    """Start and length of a shard's samples, (n, 2), and what is wrong with it, if anything."""
    spans: list[tuple[int, int]] = []
    problem = ""
    with storage.open(file) as opened:
        try:
            for sample in _samples(opened, storage.size(file)):
                if not _picture(sample, image_column):
                    continue
                length = sample.end - sample.start
                if length > _LARGEST_SAMPLE:
                    problem = f"{address(file)}: {sample.key} has {length:,} bytes, over 1 GiB; it is left out"
                    continue
                spans.append((sample.start, length))
        except _DamagedTar as error:
            what = f"its first {len(spans)} samples are read" if spans else "it is left out"
            problem = f"{address(file)} {error}; {what}"
    return np.array(spans, dtype=np.int64).reshape(-1, 2), problem


def _samples(file: BinaryIO, size: int) -> Iterator[_Sample]:
    """The samples of a tar file of `size` bytes in their order, from its headers alone.

    Raises _DamagedTar behind the last readable one.
    """
    sample: _Sample | None = None
    for member in _members(file, size):
        folder, _, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not (stem and dot and ending and member.isreg()) or stem.startswith("__"):
            continue
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.offset, member.offset)
        sample.members.setdefault(ending.lower(), (member.offset_data, member.size))
        sample.end = member.offset_data + member.size
        if sample.end > size:
            raise _DamagedTar(f"is cut off in the middle of {member.name}; copy it again")
    if sample is not None:
        yield sample


class _Headers:
    """A tar file as tarfile sees it, which reads headers only: one that says it is longer is a trap for memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _LARGEST_HEADER:
            raise _DamagedTar(f"has a header of {count:,} bytes; copy it again or remove it")
        return self._read(count)


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    if not size:
        raise _DamagedTar("is empty (0 bytes); copy it again or remove it")
    try:
        tar = tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:")  # noqa: SIM115  # the caller closes it
        behind = 0
        while (member := tar.next()) is not None:
            # What does not move forwards would be read for ever.
            if member.size < 0 or tar.offset <= behind:
                raise _DamagedTar(
                    f"has a member of {member.size:,} bytes at byte {behind:,}; copy it again or remove it"
                )
            behind = tar.offset
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
    except RecursionError:
        raise _DamagedTar("has headers of headers without end; copy it again or remove it") from None
    except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:  # from tarfile's own parsing
        raise _DamagedTar(f"is damaged ({short(error)}); copy it again") from None
    except tarfile.TarError as error:
        packed = _at(file, 0, 2) == b"\x1f\x8b"
        what = "is compressed, which allows no random access; unpack it" if packed else "copy it again"
        raise _DamagedTar(what if packed else f"is damaged or cut off ({short(error)}); {what}") from None
    # tarfile takes an unreadable header in the middle for the end.
    rest = _at(file, tar.offset, _BLOCK)
    if rest.strip(b"\0"):
        raise _DamagedTar(f"is damaged at byte {tar.offset:,}; copy it again")


def _readable(file: BinaryIO, size: int) -> Iterator[_Sample]:
    try:
        yield from _samples(file, size)
    except _DamagedTar:
        return


def _picture(sample: _Sample, image_column: str) -> str | None:
    """The ending of a sample's picture: the one that the image column names, else the first that pictures have."""
    if image_column in sample.members:
        return image_column
    return next((ending for ending in sample.members if ending.rpartition(".")[2] in PICTURES), None)


def _at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _cache_file(folder: Path, file: Path | str, storage: Storage, image_column: str) -> Path:
    """Where the places of a shard's samples are kept: its name tells address, size and time of writing."""
    written = "" if is_url(file) else str(Path(file).stat().st_mtime_ns)
    place = address(file) if is_url(file) else str(Path(file).resolve())
    name = json.dumps([place, storage.size(file), written, image_column])
    return folder / f"tar-{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def _write_cache(kept: Path, spans: NDArray[np.int64], problem: str) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, spans=spans, problem=problem)
    os.replace(temporary, kept)
