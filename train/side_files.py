"""Small files beside the data and the weights: JSON from anyone is read with a bound, and written whole or not at all.

What a crash cut off, or a hand has changed, must not end a good run with a traceback. No torch here.
"""

import json
import os
from pathlib import Path
from typing import Any


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, no UTF-8, or so deep that reading it would exhaust the stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def objects(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The JSON objects of a file with one a line, and the lines that hold none; both empty where there is no file."""
    found: list[dict[str, Any]] = []
    bad: list[bytes] = []
    if not path.exists():
        return found, bad
    for line in path.read_bytes().splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif line.strip():
            bad.append(line)
    return found, bad


def set_aside(path: Path, bad: list[bytes]) -> str:
    """Keep lines that could not be read beside their file, and say so in a sentence."""
    kept = path.with_name(f"{path.name}.bad")
    with kept.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in bad))
    return f"{path} held {len(bad)} lines that are no JSON objects (a crash may have cut them); they are in {kept}"


def write_whole(path: Path, content: str | bytes, *, aside: Path | None = None) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part, whoever else writes it.

    Args:
        path: of the file.
        content: text in UTF-8, or bytes.
        aside: a folder on the same disk where a part may be left by a kill; the file's own unless given.
    """
    temporary = (aside or path.parent) / f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
