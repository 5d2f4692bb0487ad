"""The text and JSON files of a sample as the cells of its row, in whatever Unicode they were written."""

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from train.data.rows import is_plain, kind_of, short
from train.side_files import parse_json

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
JSON = "json"
"""Ending of the file whose fields are cells."""


def plain_text(content: bytes, errors: str = "strict") -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 by their byte order mark, or UTF-16 by where its zeros stand.

    Nothing is guessed beyond that: bytes of Latin-1, say, are letters of many other encodings too.

    Raises:
        ValueError: saying what is wrong and what to do. With `errors` "surrogateescape" bytes that are no UTF-8 come as
            lone surrogates instead.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _decoded(content.removeprefix(mark), encoding, "strict" if encoding != "utf-8" else errors)
    if b"\0" in content and len(content) % 2 == 0:
        for encoding, zeros, letters in (("utf-16-le", content[1::2], content[::2]), ("utf-16-be", *_halves(content))):
            # Blanks and letters of Latin scripts have a zero on one side; no text has a NUL as a letter.
            if 2 * zeros.count(0) >= len(zeros) and not letters.count(0):
                return _decoded(content, encoding, "strict")
    return _decoded(content, "utf-8", errors)


def escaped(cell: object) -> bool:
    """Whether a cell is text with bytes that are no UTF-8, which stand in it as "surrogateescape" leaves them."""
    return isinstance(cell, str) and any("\udc80" <= letter <= "\udcff" for letter in cell)


def _halves(content: bytes) -> tuple[bytes, bytes]:
    return content[::2], content[1::2]


def _decoded(content: bytes, encoding: str, errors: str) -> str:
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        what = f"byte 0x{content[error.start]:02x} at {error.start:,}"
        raise ValueError(f"is no {encoding[:6].upper().rstrip('-')} ({what}); write it as UTF-8") from None


@dataclass
class Cells:
    """What the text files of a sample say."""

    values: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """What is wrong with cells that are there and cannot be read, by their names."""
    nested: dict[str, str] = field(default_factory=dict)
    """JSON's fields that are lists or objects, which are no cells, and what each is."""

    def put(self, name: str, value: Any) -> None:
        """A cell; one that says nothing does not take the place of one that does."""
        if name not in self.values or not (value is None or (isinstance(value, str) and not value.strip())):
            self.values[name] = value


def cells_of(members: Mapping[str, tuple[int, int]], read: Callable[[int, int], bytes]) -> Cells:
    """Cells of a sample's members (place and length by ending), of which `read` gives the bytes.

    Text files are named by what stands before ".txt" in their ending, "txt" and "caption" for nothing; JSON's fields
    have their own names, and come before a text file of the same name.
    """
    cells = Cells()
    for ending, place in members.items():
        name, _, last = ending.rpartition(".")
        if last in ("txt", "text", "caption"):
            names = (name,) if name else ("txt", "caption")
            try:
                text = plain_text(read(*place))
            except ValueError as error:
                cells.unread |= dict.fromkeys(names, f".{ending} {error}")
                continue
            for each in names:
                cells.put(each, text)
    if JSON in members:
        try:
            content = parse_json(plain_text(read(*members[JSON])))
        except ValueError as error:
            content, cells.unread[JSON] = None, f".json cannot be read ({short(error)})"
        for name, value in content.items() if isinstance(content, dict) else ():
            if is_plain(value):
                cells.put(name, value)
            else:
                cells.nested[name] = kind_of(value)
    return cells
