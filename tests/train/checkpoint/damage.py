"""What can happen to a checkpoint's files on a disk, or in the hands of someone who means harm."""

import hashlib
from pathlib import Path

from train.checkpoint import files


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


DAMAGES = {function.__name__: function for function in (flip, truncate, empty, delete)}


def reseal(folder: Path) -> None:
    """Make a manifest that fits whatever lies in the folder, as someone who means harm would."""
    for name in (files.MANIFEST, files.COMPLETE):
        (folder / name).unlink()
    content = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    entries = {n: files.Entry(len(data), hashlib.sha256(data).hexdigest()) for n, data in content.items()}
    files.write_manifest(folder, entries)
    files.mark_complete(folder)
