"""What may be shown and kept of addresses, and of text that comes from data; no torch here.

An address may hold a password before its host or a signature behind its path: neither is for a message, nor for a
config.json, which is copied into every checkpoint. Text from data may hold codes that a terminal obeys.
"""

import re
import sys
from pathlib import Path
from typing import Any, TextIO

# Credentials are what stands before "@" in the host's place; where no number of a port follows the colon, a slash or a
# question mark inside a password does not end it.
_CREDENTIALS = r"""(?:[^/?#\s"']*@|[^/?#\s"'@]*:(?!\d+(?:[/?#\s"']|$))[^\s"']*@)"""
_REST = r"""[^\s"'?#]*"""
# Up to the signs that end a part of a sentence.
_QUERY = r"""(?:[?#][^\s"']*?(?=[;,.:)\]}]*(?:[\s"']|$)))"""
_ADDRESS = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*:/{{1,2}}){_CREDENTIALS}?({_REST}){_QUERY}?")


def address(place: Path | str) -> str:
    """A path or a text with addresses, without the credentials and queries of those."""
    return _ADDRESS.sub(r"\1\2", str(place))


def settings(values: Any) -> Any:
    """The same JSON value with every text in it as `address` shows it."""
    if isinstance(values, dict):
        return {name: settings(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(settings(value) for value in values)
    return address(values) if isinstance(values, str) else values


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text with everything that a terminal would obey, hide or fail to write as an escape: "\x1b[2J", "\udcff".

    Args:
        text: any.
        lines: leave line ends as they are.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode("ascii") for c in text
    )


def tell(message: object, *, file: TextIO | None = None, lines: bool = False) -> None:
    """Print a line (or `lines`) for a person: without secrets of addresses, and nothing that a terminal obeys."""
    # The line and its end in one write: ranks share a terminal, and unbuffered streams write each piece by itself.
    print(printable(address(str(message)), lines=lines) + "\n", end="", file=file or sys.stdout, flush=True)
