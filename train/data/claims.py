"""Pieces of work that several processes, on one machine or many, share through a folder: each is taken by one.

A claim is a file made exclusively. It ends with its holder: at once where that is a process of this machine, else when
it has given no sign of life for `PATIENCE` seconds. A holder that was only asleep then does the work a second time, so
what is done under a claim must be written whole and be the same whoever does it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.side_files import parse_json

PATIENCE = 600.0
"""Seconds without a sign of life after which the holder of a claim on another machine counts as dead."""
_BEAT = 10.0


class Claim:
    """A piece of work that this process has taken. Give a sign of life with `beat`, give it back with `release`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def beat(self) -> None:
        """Say that the work goes on; call it more often than every `PATIENCE` seconds."""
        with suppress(OSError):
            os.utime(self.file)

    @contextmanager
    def beating(self) -> Iterator["Claim"]:
        """Within this context a thread gives the signs of life; behind it the claim is given back."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(_BEAT):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            self.release()

    def release(self) -> None:
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def take(file: Path) -> Claim | None:
    """The claim of this file's name, or None where another process that lives holds it."""
    for _ in range(2):
        try:
            # Whole at once: a reader never sees a claim that does not name its holder yet.
            mine = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}")
            mine.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}))
            try:
                os.link(mine, file)
            finally:
                mine.unlink()
            return Claim(file)
        except FileExistsError:
            if not _dead(file):
                return None
            _bury(file)
    return None


def is_held(file: Path) -> bool:
    """Whether a process that lives holds the claim of this file's name."""
    return not _dead(file)


def _dead(file: Path) -> bool:
    """Whether the holder of a claim is gone."""
    try:
        content = file.read_bytes()
        silent = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return True
    try:
        holder = parse_json(content)
        host, pid, born = holder["host"], int(holder["pid"]), holder["born"]
    except (ValueError, KeyError, TypeError):
        return silent > PATIENCE
    return _born(pid) != born if host == socket.gethostname() else silent > PATIENCE


def _bury(file: Path) -> None:
    """Remove a dead holder's claim; of several processes that try, one does, and a new claim is never hit."""
    aside = file.with_name(f"{file.name}.dead.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(file, aside)
        if not _dead(aside):  # another was faster, and this is its new claim
            with suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _born(pid: int) -> str:
    """When a process of this machine began, so that its number, used again, is not taken for it; "" for none."""
    try:
        # Behind the name in brackets, which may hold anything: field 22 of proc(5), in ticks since boot.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "alive"  # no /proc here (macOS)
