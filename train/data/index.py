"""What pictures and captions lie at a path: parquet files, or an image folder with a JSONL file.

Opening reads names, sizes and the small columns' headers only; picture bytes are read when a row is asked for.
"""

import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from train.errors import UserError, nearest

_JSONL_NAMES = ("captions.jsonl", "metadata.jsonl")
_FILE_FIELDS = ("file_name", "file", "image", "path")
_SPLIT_COLUMN = "split"
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_KEEP_ALL_BYTES = 1 << 30
"""Up to this size of the columns read, every row group stays in memory once read; above it, `_GROUPS_KEPT` do."""
_GROUPS_KEPT = 2
_FILES_OPEN = 16
_FILES_CHECKED = 100
"""Picture files of a JSONL that are looked for when it is opened; the others are looked for when they are read."""


@dataclass(frozen=True)
class RawRow:
    """One row as it is stored, not decoded."""

    image: bytes | Path
    """The picture's encoded bytes, or the file that holds them."""
    columns: dict[str, Any]
    """All text, number and boolean columns of the row; None where a cell is empty."""
    key: str
    """File and row (counted from 0) or line (from 1) inside the index's path, with the row's own name if it has one."""


class ImageIndex(Protocol):
    """Random access to the rows of one split; picklable, so that DataLoader workers can have one each."""

    path: Path
    columns: tuple[str, ...]
    """Names of the text, number and boolean columns."""
    fingerprint: str
    """SHA-256 (hex) over file names, sizes, row counts and the split, so that a resume can refuse changed data."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> RawRow:
        """Row 0 … len - 1. Raises IndexError out of range, UserError where the file cannot be read any more."""
        ...

    def text_rows(self) -> Iterator[RawRow]:
        """All rows in their order with empty pictures: only the small columns are read."""
        ...


class NoSplitError(UserError):
    """The data are there, but none of the split asked for: a caller for which it is optional can catch this."""


def open_images(
    path: str | Path,
    *,
    image_column: str = "image",
    caption_columns: Sequence[str] = ("caption",),
    split: str = "train",
) -> ImageIndex:
    """Index the captioned pictures of one split ("train", "val" or "test") at `path`.

    `path` is a parquet file, a folder of parquet files (at any depth), or a folder with `captions.jsonl` or
    `metadata.jsonl` (there, or in sub-folders named as splits), one object a line: `file_name` (or `file`, `image`,
    `path`, or what `image_column` says), relative to the JSONL, and the caption columns.

    A row belongs to the split that its `split` column names; else to the one in its file's name or folder
    (`train-00000-of-00001.parquet`, `val/`); else to train. Where some parquet files are named so, others are left out.

    Raises UserError for a missing path, nothing readable there, a file that is no parquet or a line that is no JSON,
    a missing column or picture file; its subclass NoSplitError where the split has no rows.
    """
    path = Path(path)
    if split not in _SPLITS.values():
        raise UserError(f"split must be train, val or test, got {split!r}{nearest(split, _SPLITS.values())}")
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"there is nothing at {path}; give a folder of parquet files or an image folder with "
            f"{_JSONL_NAMES[0]}{nearest(path.name, siblings)}"
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise UserError(f"{path} is not a parquet file; give a .parquet file, or the folder that holds the data")
        return ParquetIndex(path, [path], image_column, caption_columns, split)
    if jsonl := _jsonl_files(path):
        if any(path.glob("*.parquet")):
            raise UserError(f"{path} holds both parquet files and {jsonl[0].relative_to(path)}; give the folder of one")
        return FolderIndex(path, jsonl, image_column, caption_columns, split)
    if parquet := _parquet_files(path):
        return ParquetIndex(path, parquet, image_column, caption_columns, split)
    found = _listing(entry.name for entry in path.iterdir())
    raise UserError(
        f"{path} {f'holds only {found}' if found else 'is an empty folder'}; it needs parquet files, "
        f"or {' or '.join(_JSONL_NAMES)} beside the pictures"
    )


class ParquetIndex:
    """Rows of parquet files, read by row group: for sets over 1 GB in random order, write small row groups (~ 100)."""

    def __init__(self, path: Path, files: Sequence[Path], image_column: str, captions: Sequence[str], split: str):
        self.path, self._image = path, image_column
        root = path.parent if path.is_file() else path
        named = [file for file in files if _split_in_path(file.relative_to(root))]
        self._files: list[Path] = []
        self._names: list[str] = []
        groups: list[tuple[int, int, int, int]] = []
        chosen: list[NDArray[np.int64]] = []
        described, columns, total, size = [f"parquet {split}"], dict[str, None](), 0, 0
        for file in named or files:
            opened = _open_parquet(file)
            # A file that was itself given as the path is meant, whatever it is called.
            default = "train" if path == file and split == "train" else _split_in_path(file.relative_to(root))
            mask = _rows_of_split(file, opened, split, default or "train")
            if not mask.any():
                continue
            _check_columns(file, opened.schema_arrow, image_column, captions)
            scalars = dict.fromkeys(field.name for field in opened.schema_arrow if _is_scalar(field.type))
            columns.update(scalars)
            chosen.append(np.flatnonzero(mask) + total)
            used, first = {image_column, *scalars}, total
            for number, group in enumerate(map(opened.metadata.row_group, range(opened.num_row_groups))):
                groups.append((len(self._files), number, total, first))
                total += group.num_rows
                parts = map(group.column, range(group.num_columns))
                size += sum(c.total_uncompressed_size for c in parts if c.path_in_schema.split(".")[0] in used)
            self._files.append(file)
            self._names.append(file.relative_to(root).as_posix())
            described.append(f"{self._names[-1]} {file.stat().st_size} {opened.metadata.num_rows} {chosen[-1].size}")
        if not chosen:
            raise _no_split(path, split, (file.relative_to(root).as_posix() for file in named or files))
        self.columns = tuple(columns)
        self.fingerprint = _sha256(described)
        self._groups = np.array(groups, dtype=np.int64)
        rows = np.concatenate(chosen)
        self._rows: NDArray[np.int64] | None = None if rows.size == total else rows
        self._length = int(rows.size)
        self._keep = len(groups) if size <= _KEEP_ALL_BYTES else _GROUPS_KEPT
        self._reader: _GroupReader | None = None

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        position = index if self._rows is None else int(self._rows[index])
        # The last group that starts at or before the position; empty groups share their start with the next one.
        at = int(np.searchsorted(self._groups[:, 2], position, side="right")) - 1
        file, group, start, first = (int(value) for value in self._groups[at])
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = _GroupReader((self._image, *self.columns), self._keep)
        table = self._reader.table(self._files[file], group)
        cells = {name: table.column(name)[position - start].as_py() for name in table.column_names}
        where = f"{self._names[file]} row {position - first}"
        key = f"{where} ({cells['key']})" if cells.get("key") not in (None, "") else where
        return RawRow(
            self._picture(cells[self._image], self._files[file], key),
            {name: cells.get(name) for name in self.columns},
            key,
        )

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        reader = _GroupReader(self.columns, keep=1)
        positions = np.arange(self._length) if self._rows is None else self._rows
        for file, group, start, first in self._groups.tolist():
            table = reader.table(self._files[file], group)
            lower, upper = np.searchsorted(positions, (start, start + table.num_rows))
            cells = {name: table.column(name).to_pylist() for name in table.column_names}
            for position in positions[lower:upper].tolist():
                row = {name: cells[name][position - start] if name in cells else None for name in self.columns}
                yield RawRow(b"", row, f"{self._names[file]} row {position - first}")

    def _picture(self, cell: object, file: Path, key: str) -> bytes | Path:
        """A cell is bytes, or the {bytes, path} of Hugging Face datasets, whose path is relative to the file."""
        value = (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and (file.parent / value).is_file():
            return file.parent / value
        what = f"names the missing file {value}" if value else "is empty"
        raise UserError(f"{self.path}: {key}: the cell of column {self._image!r} {what}; mend or remove the row")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class FolderIndex:
    """Picture files named by the lines of JSONL files."""

    def __init__(self, path: Path, files: Sequence[Path], image_column: str, captions: Sequence[str], split: str):
        self.path, self._files = path, list(files)
        self._fields = (*({image_column} - set(_FILE_FIELDS)), *_FILE_FIELDS)
        # The text itself and offsets into it, not parsed objects: forked workers would copy those, page by page.
        self._text = [file.read_bytes() for file in files]
        lines: list[tuple[int, int, int, int]] = []
        described, columns = [f"jsonl {split}"], dict[str, None]()
        for number, file in enumerate(files):
            default, before = _split_in_path(file.relative_to(path)) or "train", len(lines)
            for line, start, end in _lines(self._text[number]):
                entry = self._entry(number, line, start, end)
                if _row_split(entry.get(_SPLIT_COLUMN), default) != split:
                    continue
                columns.update(dict.fromkeys(name for name, value in entry.items() if _is_plain(value)))
                lines.append((number, line, start, end))
                if len(lines) <= _FILES_CHECKED:
                    self._file(number, line, entry)
            if len(lines) > before:
                digest = hashlib.sha256(self._text[number]).hexdigest()
                described.append(f"{file.relative_to(path).as_posix()} {digest} {len(lines) - before}")
        if not any(self._text):
            raise UserError(f"{files[0]} is empty; write one JSON object a line, with file_name and a caption")
        if not lines:
            raise _no_split(path, split, (file.relative_to(path).as_posix() for file in files))
        for name in captions:
            if name not in columns:
                raise _no_column(files[lines[0][0]], name, "caption_columns", columns)
        self.columns, self.fingerprint = tuple(columns), _sha256(described)
        self._lines = np.array(lines, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        if not 0 <= index < len(self._lines):
            raise IndexError(f"row {index} of {len(self._lines)}")
        number, line, start, end = (int(value) for value in self._lines[index])
        entry = self._entry(number, line, start, end)
        image = self._file(number, line, entry)
        key = f"{self._files[number].relative_to(self.path).as_posix()} line {line} ({entry.get('key') or image.name})"
        cells = {name: entry.get(name) for name in self.columns}
        return RawRow(image, {name: value if _is_plain(value) else None for name, value in cells.items()}, key)

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for number, line, start, end in self._lines.tolist():
            entry = self._entry(number, line, start, end)
            key = f"{self._files[number].relative_to(self.path).as_posix()} line {line}"
            yield RawRow(b"", {n: entry.get(n) if _is_plain(entry.get(n)) else None for n in self.columns}, key)

    def _entry(self, number: int, line: int, start: int, end: int) -> dict[str, Any]:
        try:
            entry = json.loads(self._text[number][start:end])
        except ValueError as error:
            where = f"{self._files[number]}:{line}"
            raise UserError(f"{where}: this line is no JSON ({_short(error)}); mend or remove it") from error
        if not isinstance(entry, dict):
            raise UserError(
                f"{self._files[number]}:{line}: this line is no JSON object, but {type(entry).__name__}; "
                'write {"file_name": …, "caption": …}'
            )
        return entry

    def _file(self, number: int, line: int, entry: Mapping[str, Any]) -> Path:
        where = f"{self._files[number]}:{line}"
        names = [entry[field] for field in self._fields if isinstance(entry.get(field), str) and entry[field]]
        if not names:
            raise UserError(
                f"{where}: no field names a picture file; it needs one of {', '.join(self._fields)}, "
                f"and has {', '.join(entry) or 'none'}"
            )
        file = self._files[number].parent / str(names[0])
        if not file.is_file():
            raise UserError(f"{where}: there is no picture file {file}; mend or remove the line")
        return file


class _GroupReader:
    """Row groups as Arrow tables, the last `keep` of them held; one a process, since forks must not share its lock."""

    def __init__(self, columns: Sequence[str], keep: int) -> None:
        self.pid = os.getpid()
        self._columns, self._keep, self._lock = set(columns), keep, threading.Lock()
        self._tables: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._open: OrderedDict[Path, pq.ParquetFile] = OrderedDict()

    def table(self, file: Path, group: int) -> pa.Table:
        with self._lock:
            if (file, group) not in self._tables:
                self._tables[file, group] = self._read(file, group)
                if len(self._tables) > self._keep:
                    self._tables.popitem(last=False)
            self._tables.move_to_end((file, group))
            return self._tables[file, group]

    def _read(self, file: Path, group: int) -> pa.Table:
        if file not in self._open:
            self._open[file] = _open_parquet(file)
            if len(self._open) > _FILES_OPEN:
                self._open.popitem(last=False)[1].close()
        opened = self._open[file]
        try:
            names = [name for name in opened.schema_arrow.names if name in self._columns]
            return opened.read_row_group(group, columns=names, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: row group {group} cannot be read ({_short(error)}); copy it again") from error


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        what = "is empty (0 bytes)" if file.exists() and not file.stat().st_size else "is no readable parquet file"
        raise UserError(f"{file} {what} ({_short(error)}); copy it again or remove it") from error


def _check_columns(file: Path, schema: pa.Schema, image_column: str, caption_columns: Sequence[str]) -> None:
    for name, setting in ((image_column, "image_column"), *((name, "caption_columns") for name in caption_columns)):
        if name not in schema.names:
            raise _no_column(file, name, setting, schema.names)
        kind = schema.field(name).type
        if setting == "image_column" and not _is_picture(kind):
            raise UserError(f"{file}: column {name!r} (image_column) holds {kind}, not encoded picture bytes")
        if setting == "caption_columns" and not _is_text(kind):
            raise UserError(f"{file}: column {name!r} (caption_columns) holds {kind}, not text")


def _rows_of_split(file: Path, opened: pq.ParquetFile, split: str, default: str) -> NDArray[np.bool_]:
    """(rows,), bool: which rows of a file belong to a split."""
    names = opened.schema_arrow.names
    if _SPLIT_COLUMN not in names or not _is_text(opened.schema_arrow.field(_SPLIT_COLUMN).type):
        return np.full(opened.metadata.num_rows, default == split)
    try:
        column = opened.read(columns=[_SPLIT_COLUMN], use_threads=False).column(0)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: column 'split' cannot be read ({_short(error)}); copy it again") from error
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    values = [*encoded.dictionary.to_pylist(), None]
    wanted: NDArray[np.bool_] = np.array([_row_split(value, default) == split for value in values])
    codes: NDArray[np.int32] = encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    return wanted[codes]


def _row_split(value: object, default: str) -> str:
    return _SPLITS.get(value.strip().lower(), default) if isinstance(value, str) else default


def _split_in_path(relative: Path) -> str | None:
    """The split that a file's name says, else the nearest folder that says one: whole words, so not "constraint"."""
    for part in (relative.stem, *reversed(relative.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if split := _SPLITS.get(re.sub(r"(set|data|split)$", "", word)):
                return split
    return None


def _parquet_files(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() == ".parquet" and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _jsonl_files(folder: Path) -> list[Path]:
    folders = sorted(entry for entry in folder.iterdir() if entry.name.lower() in _SPLITS and entry.is_dir())
    found = [[entry / name for name in _JSONL_NAMES if (entry / name).is_file()] for entry in (folder, *folders)]
    for files in found:
        if len(files) > 1:
            raise UserError(f"{files[0].parent} holds both {' and '.join(_JSONL_NAMES)}; keep the one that is meant")
    return [file for files in found for file in files]


def _lines(text: bytes) -> Iterable[tuple[int, int, int]]:
    """(line number from 1, first byte, end) of the lines that are not blank."""
    start = 0
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            yield number, start, start + len(line)
        start += len(line) + 1


def _is_plain(value: object) -> bool:
    return not isinstance(value, dict | list)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_picture(kind: pa.DataType) -> bool:
    kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    return bool(_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _no_column(file: Path, name: str, setting: str, there: Iterable[str]) -> UserError:
    near = nearest(name, there := list(there))
    return UserError(f"{file} has no column {name!r} ({setting}); its columns are {', '.join(there)}{near}")


def _no_split(path: Path, split: str, names: Iterable[str]) -> NoSplitError:
    word = "validation" if split == "val" else split
    return NoSplitError(
        f"{path} has no {word} split: no row belongs to it by its file's name, its folder or a "
        f"column {_SPLIT_COLUMN!r}, among {_listing(names)}"
    )


def _listing(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _sha256(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _short(error: Exception) -> str:
    """A library's message cut to one line, since ours is one sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
