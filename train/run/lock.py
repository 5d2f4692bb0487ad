"""One job a run's folder: a lock that names who holds it, and that a killed job leaves behind without harm."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import weakref
from pathlib import Path

from train.errors import UserError
from train.side_files import parse_json

LOCK = "lock"
BEAT_SECONDS = 5.0
"""Between two signs of life."""
PATIENCE = 4
"""Missed beats after which a job elsewhere counts as dead."""
GRACE_SECONDS = 1.0
"""For which a lock of this machine may outlive its job: a killed process lets go of it only while it is torn down."""

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Holds a folder until `release`, or until this process ends.

    On one machine `flock` decides: it ends with its process, however that ended. A network filesystem may not pass it
    on to other machines (or have none), so the holder also writes a running number into the file; where a job on
    another machine wrote last, or there is no flock, the file is watched for `BEAT_SECONDS · PATIENCE` seconds before
    it is taken over.

    Raises:
        UserError: another job holds the folder (its host and process id).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._file, self._beat = -1, 0
        self._stop, self._guard = threading.Event(), threading.Lock()
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            sure = self._flock()
            if not (sure and self._holder().get("host") in (None, socket.gethostname())) and self._is_alive():
                raise UserError(self._refusal())
        except BaseException:
            self._close_file()
            raise
        self._write()
        # The thread knows the lock only weakly: one that nobody holds any more is let go.
        threading.Thread(target=_live, args=(weakref.ref(self), self._stop), name="run lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder free, without the lock's file, and without the folder where nothing was written in it."""
        self._stop.set()
        if self._file in _open_files:
            self.path.unlink(missing_ok=True)
            self._close_file()
            with contextlib.suppress(OSError):
                for part in self._made:
                    part.rmdir()

    def _flock(self) -> bool:
        """Open and lock the file; whether this filesystem has locks at all."""
        until = time.monotonic() + GRACE_SECONDS
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            _open_files.add(self._file)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(self._refusal()) from None
                self._close_file()
                time.sleep(GRACE_SECONDS / 20)
                continue
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise UserError(f"{self.path} cannot be locked: {error.strerror}") from None
                return False
            # The job before may have removed the file between our two calls: then this is a lock of nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self.path.stat()):
                    return True
            self._close_file()

    def _is_alive(self) -> bool:
        """Whether somebody's number runs on."""
        first = self._holder()
        if not first:
            return False
        until = time.monotonic() + BEAT_SECONDS * PATIENCE
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 5)
            now = self._holder()
            if now and now != first:
                return True
        return False

    def _holder(self) -> dict[str, str | int]:
        """Who wrote last. Opened anew each time: that is when a network filesystem looks for news."""
        try:
            content = parse_json(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _refusal(self) -> str:
        holder = self._holder()
        return (
            f"{self.path.parent} is in use by another job (host {holder.get('host', 'unknown')}, process "
            f"{holder.get('pid', 'unknown')}); wait for it, stop it, or give this one its own --output.name"
        )

    def __del__(self) -> None:
        self.release()

    def beat(self) -> None:
        """Give a sign of life; a full disk or a hiccup of the filesystem is no reason to stop training."""
        self._beat += 1
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "beat": f"{self._beat:012d}"}
        content = json.dumps(holder).encode()
        with self._guard:
            if self._file in _open_files:
                os.pwrite(self._file, content, 0)
                os.ftruncate(self._file, len(content))

    def _close_file(self) -> None:
        with self._guard:
            file, self._file = self._file, -1
            if file in _open_files:
                _open_files.remove(file)
                os.close(file)


def _live(lock: "weakref.ref[RunLock]", stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        held = lock()
        if held is None:
            return
        held.beat()
        del held


def _close_in_child() -> None:
    """Data workers are forked: they must not hold a lock beyond the process that took it."""
    while _open_files:
        os.close(_open_files.pop())


_open_files: set[int] = set()
os.register_at_fork(after_in_child=_close_in_child)
