"""What every kind of stored data set gives: rows of one split by number, and the words that name a split."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, nearest

SPLIT_COLUMN = "split"
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class BadSample(UserError):
    """One sample cannot be read, the others may: training takes another in its place (train/data/quarantine.py)."""


class NoSplitError(UserError):
    """The data are there, but none of the split asked for: a caller for which it is optional can catch this."""


@dataclass(frozen=True)
class RawRow:
    """One row as it is stored, not decoded."""

    image: bytes | Path
    """The picture's encoded bytes, or the file that holds them."""
    columns: dict[str, Any]
    """All text, number and boolean columns of the row, and lists of texts of parquet; None where a cell is empty."""
    key: str
    """File and row (counted from 0) or line (from 1) inside the index's path, with the row's own name if it has one."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with cells that are there and cannot be read, by column; they are None in `columns`."""


@dataclass(frozen=True)
class Account:
    """Where everything went that a place holds: `total` is `used`, and what is left out for each reason."""

    unit: str
    """What is counted: rows, lines, members of tar files."""
    total: int
    samples: int
    used: int
    """What makes the samples."""
    left: Mapping[str, int]
    """How many for each reason."""

    def __post_init__(self) -> None:
        if self.used + sum(self.left.values()) != self.total:
            raise ValueError(f"{self.total} {self.unit} are not {self.used} and {dict(self.left)}")

    def sentence(self) -> str:
        """ "55 members make 11 samples (33 members); left out: 22 of the split val"."""
        made = f"{self.total:,} {self.unit} make {self.samples:,} samples"
        made += f" (of {self.used:,} {self.unit})" if self.used not in (self.total, self.samples) else ""
        left = [f"{count:,} {reason}" for reason, count in self.left.items() if count]
        return made + (f"; left out: {', '.join(left)}" if left else "")


class ImageIndex(Protocol):
    """Random access to the rows of one split; picklable, so that DataLoader workers can have one each."""

    path: Path | str
    columns: tuple[str, ...]
    """Names of the text, number and boolean columns."""
    fingerprint: str
    """SHA-256 (hex) over file names, sizes, row counts and the split, so that a resume can refuse changed data."""

    @property
    def account(self) -> Account:
        """What the readable files hold, and what of it became no sample."""
        ...

    problems: tuple[str, ...]
    """A sentence for each file that was left out, or of which only a part can be read."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> RawRow:
        """Row 0 … len - 1. Raises IndexError out of range, BadSample where the row cannot be read (any more)."""
        ...

    def key(self, index: int) -> str:
        """A name of a row that can be told without reading it."""
        ...

    def text_rows(self) -> Iterator[RawRow]:
        """All readable rows in their order with empty pictures: only the small columns are read."""
        ...

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """(rows, 2), int32: height and width in pixels of the upright pictures; 0 where they cannot be told.

        From the columns called `width` and `height` where the data have both, else from the pictures' headers.
        """
        ...


def split_in_path(relative: Path) -> str | None:
    """The split that a file's name says, else the nearest folder that says one: whole words, so not "constraint"."""
    for part in (relative.stem, *reversed(relative.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if split := SPLITS.get(re.sub(r"(set|data|split)$", "", word)):
                return split
    return None


def unnamed(named: Collection[str], files: Collection[str]) -> list[str]:
    """A sentence where some files say their split and others do not, which are then left out."""
    others = [name for name in files if name not in named]
    if not named or not others:
        return []
    return [
        f"{len(others):,} files are left out, whose names say no split where those of others do ({listing(others)}); "
        "name them train, val or test"
    ]


def row_split(value: object, default: str) -> str:
    """The split that a cell of the column `split` names; `default` where it names none."""
    return SPLITS.get(value.strip().lower(), default) if isinstance(value, str) else default


def no_split(path: Path | str, split: str, names: Iterable[str]) -> NoSplitError:
    """Nothing of a split among these files."""
    word = "validation" if split == "val" else split
    return NoSplitError(
        f"{path} has no {word} split: no row belongs to it by its file's name, its folder or a "
        f"column {SPLIT_COLUMN!r}, among {listing(names)}"
    )


def no_column(
    file: Path | str, name: str, setting: str, there: Iterable[str], nested: Mapping[str, str] | None = None
) -> UserError:
    """A setting names a column that a file does not have, or (`nested` says what it is) one of lists or objects."""
    if nested and name in nested:
        return UserError(f"{file}: column {name!r} ({setting}) holds {nested[name]}, not text; write one text a row")
    near = nearest(name, there := list(there))
    columns = f"its columns are {', '.join(there)}{near}" if there else "it has no column of text, numbers or booleans"
    return UserError(f"{file} has no column {name!r} ({setting}); {columns}")


def check_captions(
    file: Path | str,
    captions: Sequence[str],
    there: Iterable[str],
    nested: Mapping[str, str] | None = None,
    *,
    some: bool = False,
) -> None:
    """Raise what `no_column` says where a caption column is missing; with `some` where all are."""
    there = list(there)
    missing = [name for name in captions if name not in there]
    if missing and (not some or len(missing) == len(captions)):
        raise no_column(file, missing[0], "caption_columns", there, nested)


def size_of_cells(cells: Mapping[str, Any], width: str, height: str) -> tuple[int, int]:
    """Height and width that a row's cells say; 0 and 0 where they are no positive numbers."""
    found = []
    for name in (height, width):
        try:
            found.append(int(float(cells.get(name) or 0)))
        except (TypeError, ValueError, OverflowError):
            return 0, 0
    return (found[0], found[1]) if min(found) > 0 and max(found) < 2**31 else (0, 0)


def is_plain(value: object) -> bool:
    """Whether a JSON value is text, a number, a boolean or null."""
    return not isinstance(value, dict | list)


def kind_of(value: object) -> str:
    """What a JSON value that is not plain is."""
    return "a list" if isinstance(value, list) else "an object"


def listing(names: Iterable[str]) -> str:
    """The first four of some names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def sha256(parts: Iterable[str]) -> str:
    """SHA-256 (hex) of lines of text."""
    # A file's name may be no UTF-8, and then comes with its bytes as surrogates.
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def short(error: Exception) -> str:
    """A library's message cut to one line, since ours is one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
