"""Several sources of pictures as one: parsed from `--data.path a=2 b=1`, read as one index of rows.

A source is whatever can be read alone. Rows are those of the first source, then those of the next; how often each comes
is the order's business (train/data/buckets.py), by the weights that are written here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.buckets import Mixed
from train.data.rows import Account, ImageIndex, RawRow, no_column, sha256
from train.data.settings import Data, weight_of
from train.errors import UserError, nearest
from train.shown import address

LARGEST_WEIGHT = 1e12
_FIELDS = ("image", "captions")


@dataclass(frozen=True)
class Source:
    """A place that pictures are read from."""

    path: str
    name: str
    """Last part of the path, with a number where two are the same."""
    weight: float | None
    """Its part of the samples, in proportion to those of the others; None for all: by their numbers of samples."""
    image_column: str
    caption_columns: tuple[str, ...]


def sources_of(data: Data) -> tuple[Source, ...]:
    """The sources of a data section: one where `path` is one text, which is taken as it stands.

    Raises:
        UserError: no path; weights that are none, or not for all; `source_columns` of a source that is not there.
    """
    if not data.path:
        raise UserError("this preset reads pictures: give their folder with --data.path")
    if isinstance(data.path, str):
        if data.source_columns:
            raise UserError("data.source_columns is for several sources: give --data.path FIRST=WEIGHT SECOND=WEIGHT")
        return (Source(data.path, "", None, data.image_column, data.caption_columns),)
    parsed = [weight_of(entry) for entry in data.path]
    for (path, weight), entry in zip(parsed, data.path, strict=True):
        if weight is not None and not 0 < weight < LARGEST_WEIGHT:
            raise UserError(
                f"data.path {address(entry)}: a weight is a number above 0; for {address(path)} it is {weight:g}"
            )
    weights = [weight for _, weight in parsed]
    if None in weights and any(weights):
        without = address(parsed[weights.index(None)][0])
        raise UserError(f"data.path gives weights, but none for {without}; write {without}=1, or leave out all of them")
    found: list[Source] = []
    for path, weight in parsed:
        base = PurePosixPath(address(path)).name or address(path)
        same = sum(source.name.partition("#")[0] == base for source in found)
        name = f"{base}#{same + 1}" if same else base
        found.append(Source(path, name, weight, data.image_column, data.caption_columns))
    return _with_columns(found, data.source_columns)


def places(data: Data) -> str:
    """The paths of a data section as one text for messages, without secrets."""
    return address(data.path if isinstance(data.path, str) else " ".join(data.path))


def _with_columns(sources: list[Source], entries: Sequence[str]) -> tuple[Source, ...]:
    """Give sources the columns of their own, "name:image=…" and "name:captions=a,b"."""
    names = [source.name for source in sources]
    for entry in entries:
        who, colon, rest = entry.rpartition(":")
        field, equals, value = rest.partition("=")
        columns = tuple(name.strip() for name in value.split(",") if name.strip())
        if not (colon and equals and field in _FIELDS and columns and (field == "captions" or len(columns) == 1)):
            raise UserError(
                f"data.source_columns {entry!r} is not of the form SOURCE:image=COLUMN or SOURCE:captions=COLUMN,COLUMN"
            )
        if who not in names:
            raise UserError(f"data.source_columns {entry!r}: the sources are {', '.join(names)}{nearest(who, names)}")
        number = names.index(who)
        change = {"image_column": columns[0]} if field == "image" else {"caption_columns": columns}
        sources[number] = replace(sources[number], **change)
    return tuple(sources)


class MixedIndex:
    """Rows of several indexes behind one another (an `ImageIndex`); a column that a source lacks is empty there."""

    def __init__(self, parts: Sequence[tuple[Source, ImageIndex]]) -> None:
        self.sources = [source for source, _ in parts]
        self.parts = [index for _, index in parts]
        self.path: Path | str = " + ".join(str(index.path) for index in self.parts)
        self.columns = tuple(dict.fromkeys(name for index in self.parts for name in index.columns))
        asked = dict.fromkeys(name for source in self.sources for name in source.caption_columns)
        self.caption_columns = tuple(name for name in asked if name in self.columns)
        """Those that any of the sources has."""
        self.fingerprint = sha256(["mixture", *(index.fingerprint for index in self.parts)])
        self.problems = tuple(problem for index in self.parts for problem in index.problems)
        self._firsts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def account(self) -> Account:
        """That of all sources together."""
        found = [index.account for index in self.parts]
        left: dict[str, int] = {}
        for each in found:
            for reason, count in each.left.items():
                left[reason] = left.get(reason, 0) + count
        total, samples, used = (sum(getattr(each, name) for each in found) for name in ("total", "samples", "used"))
        return Account(" and ".join(dict.fromkeys(each.unit for each in found)), total, samples, used, left)

    def mixed(self) -> Mixed:
        """Whose each row is, and the sources' shares of the samples."""
        counts = [len(index) for index in self.parts]
        weights = [n if s.weight is None else s.weight for n, s in zip(counts, self.sources, strict=True)]
        shares = tuple(weight / sum(weights) for weight in weights)
        return Mixed(np.repeat(np.arange(len(counts)), counts).astype(np.int16), shares, self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(source.name for source in self.sources)

    def source_of(self, index: int) -> int:
        """The source of a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        source = self.source_of(index)
        return self._row(source, self.parts[source].row(index - int(self._firsts[source])))

    def key(self, index: int) -> str:
        """See ImageIndex."""
        source = self.source_of(index)
        return f"{self.sources[source].name}: {self.parts[source].key(index - int(self._firsts[source]))}"

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for source, part in enumerate(self.parts):
            for row in part.text_rows():
                yield self._row(source, row)

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """See ImageIndex."""
        return np.concatenate([part.sizes(width, height) for part in self.parts])

    def captions(self) -> int:
        """How many captions the rows may have: one for each row and caption column that its source has."""
        return sum(
            len(part) * sum(name in part.columns for name in source.caption_columns)
            for source, part in zip(self.sources, self.parts, strict=True)
        )

    def told(self, samples: int) -> list[dict[str, Any]]:
        """Of each source plain values: what it holds, its share, and its epochs in so many samples of a run."""
        return [
            {
                "name": source.name,
                "path": address(source.path),
                "share": share,
                "samples": len(part),
                "epochs": round(samples * share / len(part), 2),
                "captions": [name for name in source.caption_columns if name in part.columns],
                "account": part.account.sentence(),
            }
            for source, part, share in zip(self.sources, self.parts, self.mixed().shares, strict=True)
        ]

    def _row(self, source: int, row: RawRow) -> RawRow:
        """A source's row with the columns of all; captions only from the columns that are captions there."""
        own = self.sources[source].caption_columns
        barred = set(self.caption_columns) - set(own)
        cells = {name: None if name in barred else row.columns.get(name) for name in self.columns}
        return replace(row, columns=cells, key=f"{self.sources[source].name}: {row.key}")


def open_sources(data: Data, open_one: Callable[[Source, bool], ImageIndex | None]) -> ImageIndex | None:
    """The index of a data section's sources, as `open_one` opens each; those for which it gives None are left out.

    `open_one` is told whether a caption column that is not there counts as empty, which it does in a mixture.

    Raises:
        UserError: what `sources_of` says, or a caption column that no source has.
    """
    sources = sources_of(data)
    if isinstance(data.path, str):
        return open_one(sources[0], False)
    opened = [(source, open_one(source, True)) for source in sources]
    there = [(source, index) for source, index in opened if index is not None]
    if not there:
        return None
    mixed = MixedIndex(there)
    for source in sources if len(there) == len(sources) else ():
        for name in source.caption_columns:
            if name not in mixed.columns:
                raise no_column(mixed.path, name, "caption_columns", mixed.columns)
    return mixed
