"""Rows of parquet files on a disk or behind http(s), read by row group."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from train.data.formats.storage import Storage, is_url
from train.data.formats.storage_errors import MissingFile
from train.data.rows import (
    SPLIT_COLUMN,
    Account,
    BadSample,
    RawRow,
    check_captions,
    listing,
    no_column,
    no_split,
    row_split,
    sha256,
    short,
    size_of_cells,
    split_in_path,
    unnamed,
)
from train.data.sizes import one_ahead, side_by_side, size_of_file, upright_size
from train.errors import UserError
from train.shown import address

_KEEP_BYTES = 1 << 30
"""Row groups that a process has read stay in memory up to this size; those not used for longest go first."""
_WORTH_KEEPING = 8
"""Of sets more times larger than that only the last row group stays: it would be memory for one hit in eight."""
_FILES_OPEN = 256
_FOOTER_BYTES = 16 << 20
"""Of files that stay open, whose lists of columns take several times that in memory; a prepared shard has 60 kB."""
PREPARED = b"prx_prepared"
"""In the metadata of the files that prepare.py writes."""


class ParquetIndex:
    """Rows of parquet files: for sets over 1 GB in random order write small row groups (~ 100), or tar files."""

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
        """`files` are the readable places of files by their names inside `path`."""
        self.path, self._image, self._storage = path, image_column, storage
        named = {name: file for name, file in files.items() if split_in_path(Path(name))}
        self._files: list[Path | str] = []
        self._names: list[str] = []
        groups: list[tuple[int, int, int, int]] = []
        chosen: list[NDArray[np.int64]] = []
        described, columns, total, size = [f"parquet {split}"], dict[str, None](), 0, 0
        problems: list[str] = []
        rows_seen = 0
        for name, file in (named or files).items():
            try:
                opened = _open_parquet(file, storage)
                # A file that was itself given as the path is meant, whatever it is called.
                default = "train" if len(files) == 1 and str(path) == address(file) and split == "train" else None
                mask = _rows_of_split(file, opened, split, default or split_in_path(Path(name)) or "train")
                counted = _row_groups(file, opened)
            except BadSample as error:
                problems.append(f"{error}; it is left out")
                continue
            rows_seen += opened.metadata.num_rows
            if not mask.any():
                continue
            fields, names = list(opened.schema_arrow), opened.schema_arrow.names
            checked = [name for name in captions if name in names or not some_captions]
            _check_columns(file, opened, image_column, checked)
            cells = dict.fromkeys(f.name for f in fields if _is_cell(f.type, opened) and names.count(f.name) == 1)
            columns.update(cells)
            used = {image_column, *cells}
            chosen.append(np.flatnonzero(mask) + total)
            first = total
            for number, (group_rows, sizes) in enumerate(counted):
                groups.append((len(self._files), number, total, first))
                total += group_rows
                size += sum(nbytes for column, nbytes in sizes if column in used)
            self._files.append(file)
            self._names.append(name)
            described.append(f"{name} {storage.size(file)} {opened.metadata.num_rows} {chosen[-1].size}")
        if problems and len(problems) == len(named or files):
            raise UserError(problems[0].removesuffix("; it is left out"))
        if not chosen and not rows_seen:
            raise UserError(f"{path} has no rows: {listing((named or files).keys())} hold columns and nothing in them")
        if not chosen:
            raise no_split(path, split, (named or files).keys())
        check_captions(address(self._files[0]), captions, columns, some=some_captions)
        self.columns, self.problems = tuple(columns), (*unnamed(named, files), *problems)
        self.fingerprint = sha256(described)
        self._groups = np.array(groups, dtype=np.int64)
        rows = np.concatenate(chosen)
        self._rows: NDArray[np.int64] | None = None if rows.size == total else rows
        self._length, self._total = int(rows.size), total
        others = {f"of other splits than {split}": rows_seen - self._length}
        self.account = Account("rows", rows_seen, self._length, self._length, others)
        self._keep = _KEEP_BYTES if size <= _WORTH_KEEPING * _KEEP_BYTES else 0
        self._reader: _GroupReader | None = None

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        file, group, start, first, position = self._place(index)
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = _GroupReader((self._image, *self.columns), self._keep, self._storage)
        table = self._reader.table(self._files[file], group)
        cells = {name: _as_python(table.column(name)[position - start]) for name in table.column_names}
        where = f"{self._names[file]} row {position - first}"
        key = f"{where} ({cells['key']})" if cells.get("key") not in (None, "") else where
        return RawRow(
            self._picture(cells[self._image], self._files[file], key),
            {name: cells.get(name) for name in self.columns},
            key,
            {
                name: f"its {name} is no UTF-8; write the row again"
                for name, cell in cells.items()
                if cell is None and table.column(name)[position - start].is_valid
            },
        )

    def key(self, index: int) -> str:
        """See ImageIndex."""
        file, _, _, first, position = self._place(index)
        return f"{self._names[file]} row {position - first}"

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for file, first, start, positions, table in self._walk(self.columns):
            if table is None:
                continue
            cells = {column: _as_list(table.column(column)) for column in table.column_names}
            for position in positions:
                row = {name: cells[name][position - start] if name in cells else None for name in self.columns}
                yield RawRow(b"", row, f"{self._names[file]} row {position - first}")

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """See ImageIndex. Without both columns every picture's bytes are read once."""
        told = width in self.columns and height in self.columns
        found = self._told_sizes(width, height) if told else self._picture_sizes()
        return found if self._rows is None else found[self._rows]

    def _told_sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """(rows of all files, 2) what the columns say; file by file, for groups may be small and many."""
        found = np.zeros((self._total, 2), np.int32)
        ends = [*self._groups[1:, 2].tolist(), self._total]
        for file in range(len(self._files)):
            first = int(self._groups[np.searchsorted(self._groups[:, 0], file), 3])
            try:
                table = _read_columns(self._files[file], self._storage, (width, height))
                found[first : first + len(table)] = _sizes_of_columns(table, width, height)
            except BadSample:  # then what can be read of it, group by group
                reader = _GroupReader((width, height), 0, self._storage)
                for number in np.flatnonzero(self._groups[:, 0] == file).tolist():
                    with suppress(BadSample):
                        table = reader.table(self._files[file], int(self._groups[number, 1]))
                        sizes = _sizes_of_columns(table, width, height)
                        found[int(self._groups[number, 2]) : ends[number]] = sizes
        return found

    def _picture_sizes(self) -> NDArray[np.int32]:
        """(rows of all files, 2) what the pictures' heads say; 0 for rows that do not belong to the split."""
        found = np.zeros((self._total, 2), np.int32)
        # The next row group is read while the heads of one are looked at.
        for file, _, start, positions, table in one_ahead(self._walk((self._image,))):
            if table is not None and positions:
                folder, column = Path(self._files[file]).parent, table.column(self._image)
                values = [_value(_as_python(column[position - start])) for position in positions]
                look = partial(_cell_size, folder)
                # Threads hide a disk's time for files, and only cost where the bytes are here.
                here = all(isinstance(value, bytes) for value in values)
                found[positions] = list(map(look, values) if here else side_by_side(look, iter(values)))
        return found

    def group_bytes(self) -> int:
        """Bytes of the largest row group, uncompressed: what one picture costs where its group is not in memory."""
        largest = 0
        for file in self._files:
            metadata = _open_parquet(file, self._storage).metadata
            largest = max(largest, *(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)))
        return largest

    def _place(self, index: int) -> tuple[int, int, int, int, int]:
        """File, row group, the group's and the file's first position, and a row's own position in all files."""
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        position = index if self._rows is None else int(self._rows[index])
        # The last group that starts at or before the position; empty groups share their start with the next one.
        at = int(np.searchsorted(self._groups[:, 2], position, side="right")) - 1
        file, group, start, first = (int(value) for value in self._groups[at])
        return file, group, start, first, position

    def _walk(self, columns: Sequence[str]) -> Iterator[tuple[int, int, int, list[int], "pa.Table | None"]]:
        """File, its first position, the group's, positions of rows and the table (None: unreadable) of each group."""
        reader = _GroupReader(columns, 0, self._storage)
        ends = [*self._groups[1:, 2].tolist(), self._total]
        for (file, group, start, first), end in zip(self._groups.tolist(), ends, strict=True):
            if self._rows is None:
                positions = list(range(start, end))
            else:
                lower, upper = np.searchsorted(self._rows, (start, end))
                positions = self._rows[lower:upper].tolist()
            try:
                table = reader.table(self._files[file], group) if positions else None
            except BadSample:
                table = None
            yield file, first, start, positions, table

    def _picture(self, cell: object, file: Path | str, key: str) -> bytes | Path:
        """A cell is bytes, or the {bytes, path} of Hugging Face datasets, whose path is relative to the file."""
        value = _value(cell)
        if isinstance(value, bytes):
            return value
        if isinstance(value, str) and not is_url(file) and (Path(file).parent / value).is_file():
            return Path(file).parent / value
        what = f"names the missing file {value}" if value else "is empty"
        raise BadSample(f"{self.path}: {key}: the cell of column {self._image!r} {what}; mend or remove the row")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


def _as_python(cell: Any) -> Any:
    """A cell's value; None where its bytes are no value of its type (text that is no UTF-8)."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


def _as_list(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_as_python(cell) for cell in column]


def _value(cell: object) -> object:
    return (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell


def _cell_size(folder: Path, value: object) -> tuple[int, int]:
    if isinstance(value, bytes):
        return upright_size(lambda count: value[:count])
    return size_of_file(folder / value) if isinstance(value, str) else (0, 0)


def _read_columns(file: Path | str, storage: Storage, columns: Sequence[str]) -> pa.Table:
    """Small columns of a whole file. Raises BadSample."""
    opened = _open_parquet(file, storage)
    try:
        names = [name for name in opened.schema_arrow.names if name in columns]
        return opened.read(columns=names, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadSample(f"{address(file)} cannot be read ({short(error)}); copy it again") from error


def _sizes_of_columns(table: pa.Table, width: str, height: str) -> NDArray[np.int32]:
    """(rows, 2) height and width that two columns say; 0 and 0 where they are no positive numbers."""
    if not {width, height} <= set(table.column_names):
        return np.zeros((len(table), 2), np.int32)
    columns = [table.column(name) for name in (height, width)]
    if all(pa.types.is_integer(column.type) for column in columns):
        sides = np.stack([column.cast(pa.int64(), safe=False).fill_null(0).to_numpy() for column in columns], axis=1)
        known = (sides.min(axis=1) > 0) & (sides.max(axis=1) < 2**31)
        return np.where(known[:, None], sides, 0).astype(np.int32)
    cells = [dict(zip((height, width), pair, strict=True)) for pair in zip(*map(_as_list, columns), strict=True)]
    return np.array([size_of_cells(cell, width, height) for cell in cells], np.int32).reshape(-1, 2)


class _GroupReader:
    """Row groups as Arrow tables, those up to `keep` bytes held; one a process, since forks must not share its lock."""

    def __init__(self, columns: Sequence[str], keep: int, storage: Storage) -> None:
        self.pid = os.getpid()
        self._columns, self._keep, self._storage, self._lock = set(columns), keep, storage, threading.Lock()
        self._tables: OrderedDict[tuple[Path | str, int], pa.Table] = OrderedDict()
        self._held = 0
        self._open: OrderedDict[Path | str, pq.ParquetFile] = OrderedDict()
        self._footers = 0

    def table(self, file: Path | str, group: int) -> pa.Table:
        with self._lock:
            if (file, group) not in self._tables:
                self._tables[file, group] = self._read(file, group)
                self._held += self._tables[file, group].nbytes
                while self._held > self._keep and len(self._tables) > 1:
                    self._held -= self._tables.popitem(last=False)[1].nbytes
            self._tables.move_to_end((file, group))
            return self._tables[file, group]

    def _read(self, file: Path | str, group: int) -> pa.Table:
        if file not in self._open:
            self._open[file] = _open_parquet(file, self._storage)
            self._footers += self._open[file].metadata.serialized_size
            while len(self._open) > 1 and (len(self._open) > _FILES_OPEN or self._footers > _FOOTER_BYTES):
                oldest = self._open.popitem(last=False)[1]
                self._footers -= oldest.metadata.serialized_size
                oldest.close()
        opened = self._open[file]
        try:
            names = [name for name in opened.schema_arrow.names if name in self._columns]
            return opened.read_row_group(group, columns=names, use_threads=False)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise BadSample(
                f"{address(file)}: row group {group} cannot be read ({short(error)}); copy it again"
            ) from error


def _open_parquet(file: Path | str, storage: Storage) -> pq.ParquetFile:
    """Raises BadSample for a file that is missing or no parquet."""
    try:
        return pq.ParquetFile(storage.open(file), pre_buffer=True) if is_url(file) else pq.ParquetFile(file)
    except MissingFile as error:
        raise BadSample(str(error)) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        empty = not is_url(file) and Path(file).exists() and not storage.size(file)
        what = "is empty (0 bytes)" if empty else "is no readable parquet file"
        raise BadSample(f"{address(file)} {what} ({short(error)}); copy it again or remove it") from error


def _check_columns(file: Path | str, opened: pq.ParquetFile, image_column: str, caption_columns: Sequence[str]) -> None:
    schema = opened.schema_arrow
    for name, setting in ((image_column, "image_column"), *((name, "caption_columns") for name in caption_columns)):
        if name not in schema.names:
            raise no_column(address(file), name, setting, schema.names)
        if schema.names.count(name) > 1:
            several = f"{schema.names.count(name)} columns called {name!r} ({setting})"
            raise UserError(f"{address(file)} has {several}, which cannot be told apart; give them names of their own")
        kind = schema.field(name).type
        if setting == "image_column" and not _is_picture(kind):
            raise UserError(f"{address(file)}: column {name!r} (image_column) holds {kind}, not encoded picture bytes")
        if setting == "caption_columns" and not (_is_caption(kind) or _is_texts(kind, opened)):
            lists = "; each row has a list of captions, so write a column for each" if pa.types.is_nested(kind) else ""
            raise UserError(f"{address(file)}: column {name!r} (caption_columns) holds {kind}, not text{lists}")


def _row_groups(file: Path | str, opened: pq.ParquetFile) -> list[tuple[int, list[tuple[str, int]]]]:
    """Of each row group: its rows, and of its parts the column and the bytes that it has in memory."""
    found = []
    try:
        for group in map(opened.metadata.row_group, range(opened.num_row_groups)):
            parts = map(group.column, range(group.num_columns))
            sizes = [(part.path_in_schema.split(".")[0], part.total_uncompressed_size) for part in parts]
            found.append((group.num_rows, sizes))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # a name that is not UTF-8 is a ValueError
        raise BadSample(
            f"{address(file)}: its list of columns cannot be read ({short(error)}); copy it again"
        ) from error
    return found


def _rows_of_split(file: Path | str, opened: pq.ParquetFile, split: str, default: str) -> NDArray[np.bool_]:
    """(rows,), bool: which rows of a file belong to a split."""
    names = opened.schema_arrow.names
    if names.count(SPLIT_COLUMN) != 1 or not _is_text(opened.schema_arrow.field(SPLIT_COLUMN).type):
        return np.full(opened.metadata.num_rows, default == split)
    try:
        column = opened.read(columns=[SPLIT_COLUMN], use_threads=False).column(0)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise BadSample(f"{address(file)}: column 'split' cannot be read ({short(error)}); copy it again") from error
    encoded = column.cast(pa.string()).combine_chunks().dictionary_encode()
    values = [*_as_list(encoded.dictionary), None]
    wanted: NDArray[np.bool_] = np.array([row_split(value, default) == split for value in values])
    codes: NDArray[np.int32] = encoded.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    return wanted[codes]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_caption(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_null(kind))  # a file of which no row has one


def _is_picture(kind: pa.DataType) -> bool:
    kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_texts(kind: pa.DataType, opened: pq.ParquetFile) -> bool:
    """Whether a column holds all captions of a picture, as prepare.py writes them."""
    listed = pa.types.is_list(kind) and _is_text(kind.value_type)
    return bool(listed) and PREPARED in (opened.schema_arrow.metadata or {})


def _is_cell(kind: pa.DataType, opened: pq.ParquetFile) -> bool:
    """Whether a column's cells are among a row's `columns`."""
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(_is_caption(kind) or _is_texts(kind, opened) or number)
