"""Samples of WebDataset tar files on a disk or behind http(s), each read by one access to its place in the file.

tar_members.py says which members are a sample. One whose members stand apart is read by an access to each.
"""

import hashlib
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from train.data.formats.cells import JSON, Cells, cells_of
from train.data.formats.storage import Storage, is_url
from train.data.formats.storage_errors import MissingFile
from train.data.formats.tar_members import (
    BLOCK,
    PICTURES,
    PLUGINS,
    DamagedTar,
    Members,
    Sample,
    at,
    is_picture,
    picture_of,
    runs,
)
from train.data.rows import (
    Account,
    BadSample,
    RawRow,
    check_captions,
    listing,
    no_split,
    sha256,
    short,
    size_of_cells,
    split_in_path,
    unnamed,
)
from train.data.sizes import upright_size
from train.errors import UserError
from train.shown import address
from train.side_files import parse_json, write_whole

_FIRST_SAMPLES = 32
"""Samples of the first shard whose text files and JSON fields say which columns there are."""
_SHARDS_AT_ONCE = 8
_LARGEST_SAMPLE = 1 << 30
"""Bytes of a sample, which is read whole."""

_Read = Callable[[int, int], bytes]
"""Gives so many bytes from a place on."""


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
        some_captions: bool = False,
    ):
        """`files` are the readable places of files by their names inside `path`.

        Raises UserError where none can be read, or a caption's column is nowhere; NoSplitError; StorageError.
        """
        self.path, self._image, self._storage = path, image_column, storage
        self._asked = (image_column, *captions)
        named = {name: file for name, file in files.items() if split_in_path(Path(name))}
        alone = len(files) == 1 and str(path) == address(next(iter(files.values()))) and split == "train"
        wanted = {n: f for n, f in (named or files).items() if alone or (split_in_path(Path(n)) or "train") == split}
        if not wanted:
            raise no_split(path, split, (named or files).keys())
        scans = self._scan_all(list(wanted.values()), cache)
        self.problems = tuple(shard.problem for shard in scans if shard.problem)
        good = [(n, f, s) for (n, f), s in zip(wanted.items(), scans, strict=True) if len(s.spans)]
        self.account = _account(scans)
        if not good:
            nothing = f"{path} has no sample with a picture, among {listing(wanted)}: {self.account.sentence()}"
            raise UserError(self.problems[0].removesuffix("; it is left out") if self.problems else nothing)
        self.problems = (*unnamed(named, files), *self.problems)
        self._names, self._files = [name for name, _, _ in good], [file for _, file, _ in good]
        spans = [shard.spans for _, _, shard in good]
        self._firsts = np.cumsum([0, *map(len, spans)])
        self._starts: NDArray[np.int64] = np.concatenate([each[:, 0] for each in spans])
        self._lengths: NDArray[np.uint32] = np.concatenate([each[:, 1] for each in spans]).astype(np.uint32)
        # Few, or the tar was packed in an order that no one would read it in: as text, which is small.
        self._scattered = {
            int(first) + number: json.dumps(rest)
            for first, (_, _, shard) in zip(self._firsts, good, strict=False)
            for number, *rest in shard.scattered
        }
        self.fingerprint = sha256(
            [f"tar {split}", *(f"{name} {storage.size(file)} {len(shard.spans)}" for name, file, shard in good)]
        )
        columns = dict[str, None]()
        nested: dict[str, str] = {}
        for _, cells in islice(self._texts(0), _FIRST_SAMPLES):
            columns.update(dict.fromkeys(n for n in (*cells.values, *cells.unread) if n != JSON))
            nested |= cells.nested
        self.columns = tuple(columns)
        check_captions(address(self._files[0]), captions, columns, nested, some=some_captions)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        key = self.key(index)
        try:
            sample, read = self._scattered_row(index) or self._row_in_one_piece(index)
            picture = read(*sample.members[picture_of(sample, self._image) or ""])
        except (DamagedTar, StopIteration, KeyError) as error:
            raise BadSample(f"{self.path}: {key}: cannot be read ({short(error)}); copy the file again") from None
        cells = cells_of(sample.members, read)
        return RawRow(
            picture,
            {name: cells.values.get(name) for name in self.columns},
            f"{key} ({sample.key})",
            cells.unread,
        )

    def _row_in_one_piece(self, index: int) -> tuple[Sample, _Read]:
        """A sample, read at once, and what gives parts of it."""
        start, length = int(self._starts[index]), int(self._lengths[index])
        span = self._storage.read(self._files[self._place(index)[0]], start, length)
        if len(span) < length:
            raise DamagedTar("the file has become shorter")
        padded = span + bytes(-length % BLOCK)
        sample = next(runs(io.BytesIO(padded), len(padded), self._asked))
        return sample, lambda at, count: span[at : at + count]

    def _scattered_row(self, index: int) -> tuple[Sample, _Read] | None:
        """A sample whose members stand apart, and what reads them one by one; None for others."""
        if (sample := self._scattered_sample(index)) is None:
            return None
        file = self._files[self._place(index)[0]]

        def read(start: int, count: int) -> bytes:
            content = self._storage.read(file, start, count)
            if len(content) < count:
                raise DamagedTar("the file has become shorter")
            return content

        return sample, read

    def _scattered_sample(self, index: int) -> Sample | None:
        if index not in self._scattered:
            return None
        key, members = json.loads(self._scattered[index])
        places = {ending: (int(start), int(size)) for ending, (start, size) in members.items()}
        return Sample(key, int(self._starts[index]), 0, places, scattered=True)

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
                    begin, size = sample.members[picture_of(sample, self._image) or ""]
                    found.append(upright_size(lambda count, start=begin, size=size: at(file, start, min(count, size))))  # type: ignore[misc]
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

    def _rows(self, shard: int, file: BinaryIO) -> Iterator[Sample]:
        """The samples of a shard that are rows of this index."""
        stream = _readable(file, self._storage.size(self._files[shard]), self._asked)
        for row in range(int(self._firsts[shard]), int(self._firsts[shard + 1])):
            sample = self._scattered_sample(row)
            if sample is None:
                sample = next((s for s in stream if s.start == self._starts[row] and not s.scattered), None)
            if sample is None:
                return
            yield sample

    def _texts(self, shard: int) -> Iterator[tuple[Sample, Cells]]:
        """The samples of a shard with the content of their text files; pictures are jumped over."""
        with self._storage.open(self._files[shard]) as file:
            for sample in self._rows(shard, file):
                yield sample, cells_of(sample.members, partial(at, file))

    def _scan_all(self, files: Sequence[Path | str], cache: Path | None) -> "list[_Shard]":
        order = list(range(len(files)))
        # Processes that share a cache read different shards first, and find the others' work when they come to it.
        random.Random(os.getpid()).shuffle(order)
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            found = dict(zip(order, pool.map(lambda n: self._scan(files[n], cache), order), strict=True))
        return [found[number] for number in range(len(files))]

    def _scan(self, file: Path | str, cache: Path | None) -> "_Shard":
        try:
            kept = _cache_file(cache, file, self._storage, self._asked) if cache else None
            if kept is not None and kept.exists():
                with np.load(kept, allow_pickle=False) as loaded:
                    return _Shard(loaded["spans"], **parse_json(str(loaded["rest"])))
            shard = _scan_shard(file, self._storage, self._asked)
        except MissingFile as error:
            return _Shard(np.zeros((0, 2), np.int64), f"{error}; it is left out", [], 0, {})
        if kept is not None:
            _write_cache(kept, shard)
        return shard


def _account(shards: "Sequence[_Shard]") -> Account:
    left: Counter[str] = Counter()
    for shard in shards:
        left.update(shard.left)
    used = sum(shard.used for shard in shards)
    return Account("members", used + left.total(), sum(len(shard.spans) for shard in shards), used, left)


@dataclass(frozen=True)
class _Shard:
    """What the headers of a tar file say."""

    spans: NDArray[np.int64]
    """(samples, 2): start and length of each; a length of 0 where its members do not stand in one piece."""
    problem: str
    """What is wrong with it, if anything."""
    scattered: list[list[Any]]
    """Number, name and members of the samples with length 0."""
    used: int
    left: dict[str, int]


def _scan_shard(file: Path | str, storage: Storage, asked: Sequence[str]) -> _Shard:
    spans: list[tuple[int, int]] = []
    scattered: list[list[Any]] = []
    problem, used = "", 0
    with storage.open(file) as opened:
        found = Members(opened, storage.size(file), asked)
    for sample in found.samples:
        if picture_of(sample, asked[0]) is None:
            found.left[_why_no_picture(sample)] += len(sample.members)
        elif sample.bytes > _LARGEST_SAMPLE:
            problem = f"{address(file)}: {sample.key} has {sample.bytes:,} bytes, over 1 GiB; it is left out"
            found.left["of samples over 1 GiB"] += len(sample.members)
        else:
            used += len(sample.members)
            if sample.scattered:
                scattered.append([len(spans), sample.key, sample.members])
            spans.append((sample.start, 0 if sample.scattered else sample.bytes))
    if found.problem is not None:
        what = f"its first {len(spans)} samples are read" if spans else "it is left out"
        problem = f"{address(file)} {found.problem}; {what}"
    return _Shard(np.array(spans, dtype=np.int64).reshape(-1, 2), problem, scattered, used, dict(found.left))


def _why_no_picture(sample: Sample) -> str:
    lasts = [ending.rpartition(".")[2] for ending in sample.members]
    for last in lasts:
        if last in PLUGINS:
            return f"of samples whose picture ends in .{last} (install {PLUGINS[last]} to read it)"
    return f"of samples without a picture that is known (.{', .'.join(sorted(set(lasts))[:4])})"


def _readable(file: BinaryIO, size: int, asked: Sequence[str]) -> Iterator[Sample]:
    try:
        yield from runs(file, size, asked)
    except DamagedTar:
        return


def _cache_file(folder: Path, file: Path | str, storage: Storage, asked: Sequence[str]) -> Path:
    """Where what a shard holds is kept: its name tells address, size and time of writing, and what can be read."""
    written = "" if is_url(file) else str(Path(file).stat().st_mtime_ns)
    place = address(file) if is_url(file) else str(Path(file).resolve())
    name = json.dumps([place, storage.size(file), written, *asked, *filter(is_picture, (*PICTURES, *PLUGINS))])
    return folder / f"tar-{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def _write_cache(kept: Path, shard: _Shard) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in vars(shard).items() if name != "spans"}
    stream = io.BytesIO()
    np.savez(stream, spans=shard.spans, rest=json.dumps(rest))
    write_whole(kept, stream.getvalue())
