"""Picture files named by the lines of JSONL files."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.formats.cells import escaped, plain_text
from train.data.rows import (
    SPLIT_COLUMN,
    Account,
    BadSample,
    RawRow,
    check_captions,
    is_plain,
    kind_of,
    no_split,
    row_split,
    sha256,
    short,
    size_of_cells,
    split_in_path,
)
from train.data.sizes import side_by_side, size_of_file
from train.errors import UserError
from train.side_files import parse_json

_FILE_FIELDS = ("file_name", "file", "image", "path")
_FILES_CHECKED = 100
"""Picture files that are looked for when a JSONL is opened: if all are missing, the folder is a wrong one."""


class FolderIndex:
    """Picture files named by the lines of JSONL files."""

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        image_column: str,
        captions: Sequence[str],
        split: str,
        some_captions: bool = False,
    ):
        self.path: Path | str = path
        self._root, self._files = path, list(files)
        self._fields = (*({image_column} - set(_FILE_FIELDS)), *_FILE_FIELDS)
        # The text itself and offsets into it, not parsed objects: forked workers would copy those, page by page.
        self._text = [_utf8(file) for file in files]
        lines: list[tuple[int, int, int, int]] = []
        seen = 0
        pictures: list[Path] = []
        described, columns, nested = [f"jsonl {split}"], dict[str, None](), dict[str, str]()
        for number, file in enumerate(files):
            default, before = split_in_path(file.relative_to(path)) or "train", len(lines)
            for line, start, end in _lines(self._text[number]):
                entry, seen = self._entry(number, line, start, end), seen + 1
                if row_split(entry.get(SPLIT_COLUMN), default) != split:
                    continue
                columns.update(dict.fromkeys(name for name, value in entry.items() if is_plain(value)))
                nested |= {name: kind_of(value) for name, value in entry.items() if not is_plain(value)}
                lines.append((number, line, start, end))
                if len(lines) <= _FILES_CHECKED:
                    pictures.append(self._named(number, line, entry))
            if len(lines) > before:
                digest = hashlib.sha256(self._text[number]).hexdigest()
                described.append(f"{file.relative_to(path).as_posix()} {digest} {len(lines) - before}")
        if not any(text.strip() for text in self._text):
            raise UserError(f"{files[0]} is empty; write one JSON object a line, with file_name and a caption")
        if not lines:
            raise no_split(path, split, (file.relative_to(path).as_posix() for file in files))
        if not any(picture.is_file() for picture in pictures):
            raise UserError(f"{files[lines[0][0]]}:{lines[0][1]}: {_missing(pictures[0])}")
        check_captions(files[lines[0][0]], captions, columns, nested, some=some_captions)
        self.columns, self.fingerprint = tuple(columns), sha256(described)
        self._lines = np.array(lines, dtype=np.int64)
        self.problems: tuple[str, ...] = ()
        others = {f"of other splits than {split}": seen - len(lines)}
        self.account = Account("lines", seen, len(lines), len(lines), others)

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> RawRow:
        """See ImageIndex."""
        if not 0 <= index < len(self._lines):
            raise IndexError(f"row {index} of {len(self._lines)}")
        number, line, start, end = (int(value) for value in self._lines[index])
        entry = self._entry(number, line, start, end)
        image = self._named(number, line, entry)
        if not image.is_file():
            raise BadSample(f"{self._files[number]}:{line}: {_missing(image)}")
        key = f"{self._files[number].relative_to(self._root).as_posix()} line {line} ({entry.get('key') or image.name})"
        return RawRow(image, *self._cells(entry, key))

    def key(self, index: int) -> str:
        """See ImageIndex."""
        number, line = self._lines[index, :2].tolist()
        return f"{self._files[number].relative_to(self._root).as_posix()} line {line}"

    def text_rows(self) -> Iterator[RawRow]:
        """See ImageIndex."""
        for number, line, start, end in self._lines.tolist():
            entry = self._entry(number, line, start, end)
            key = f"{self._files[number].relative_to(self._root).as_posix()} line {line}"
            yield RawRow(b"", *self._cells(entry, key))

    def sizes(self, width: str, height: str) -> NDArray[np.int32]:
        """See ImageIndex."""
        entries = ((n, line, self._entry(n, line, start, end)) for n, line, start, end in self._lines.tolist())
        if width in self.columns and height in self.columns:
            found = [size_of_cells(entry, width, height) for _, _, entry in entries]
        else:
            found = list(side_by_side(size_of_file, (self._named(*entry) for entry in entries)))
        return np.array(found, dtype=np.int32).reshape(-1, 2)

    def _cells(self, entry: Mapping[str, Any], key: str) -> tuple[dict[str, Any], str, dict[str, str]]:
        """A row's cells, its key, and what is wrong with cells that cannot be read."""
        cells = {name: entry.get(name) for name in self.columns}
        unread = {n: f"its {n} is no UTF-8; write the JSONL as UTF-8" for n, cell in cells.items() if escaped(cell)}
        good = {n: cell if is_plain(cell) and n not in unread else None for n, cell in cells.items()}
        return good, key, unread

    def _entry(self, number: int, line: int, start: int, end: int) -> dict[str, Any]:
        try:
            entry = parse_json(self._text[number][start:end].decode("utf-8", "surrogateescape"))
        except ValueError as error:
            where = f"{self._files[number]}:{line}"
            raise UserError(f"{where}: this line is no JSON ({short(error)}); mend or remove it") from error
        if not isinstance(entry, dict):
            raise UserError(
                f"{self._files[number]}:{line}: this line is no JSON object, but {type(entry).__name__}; "
                'write {"file_name": …, "caption": …}'
            )
        return entry

    def _named(self, number: int, line: int, entry: Mapping[str, Any]) -> Path:
        names = [entry[field] for field in self._fields if isinstance(entry.get(field), str) and entry[field]]
        if not names:
            raise BadSample(
                f"{self._files[number]}:{line}: no field names a picture file; it needs one of "
                f"{', '.join(self._fields)}, and has {', '.join(entry) or 'none'}"
            )
        return self._files[number].parent / str(names[0])


def _utf8(file: Path) -> bytes:
    """A JSONL file as UTF-8, whatever Unicode it is; bytes that are none stay as they are."""
    try:
        return plain_text(file.read_bytes(), "surrogateescape").encode("utf-8", "surrogateescape")
    except ValueError as error:
        raise UserError(f"{file} {error}") from None


def _missing(file: Path) -> str:
    return f"there is no picture file {file}; mend or remove the line"


def _lines(text: bytes) -> Iterable[tuple[int, int, int]]:
    """(line number from 1, first byte, end) of the lines that are not blank."""
    start = 0
    for number, line in enumerate(text.split(b"\n"), start=1):
        if line.strip():
            yield number, start, start + len(line)
        start += len(line) + 1
