"""Bytes of files on a disk, behind http(s) or in object stores: sizes, ranges and file objects, with retries.

A remote server that drops, stalls or is overloaded is asked again with growing, random pauses; one that stays so ends
in one sentence. Local files go straight to the operating system.
"""

import io
import math
import os
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

from train.data.formats.object_stores import ObjectStores, scheme_of
from train.data.formats.storage_errors import MissingFile, StorageError
from train.data.rows import short
from train.errors import UserError
from train.shown import address

_FILES_OPEN = 64
_BUFFER = 1 << 16
"""Bytes that one request takes where a remote file is read in order."""
_SLOWEST = 1 << 16
"""Bytes a second below which an answer counts as stalled, beyond the time limit."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""HTTP states that another try may change (RFC 9110, 6585)."""
_WHOLE_BYTES = 1 << 28
"""Largest file that is kept whole in memory where a server knows no ranges."""
_CHUNK = 1 << 16
_MOST_NAMES = 1_000_000
"""That a brace pattern may stand for."""


def is_url(path: Path | str) -> bool:
    """Whether a path is an address: of http or https, or of an object store."""
    return str(path).lower().startswith(("http://", "https://")) or scheme_of(path) is not None


def expand(pattern: str) -> list[str]:
    """All names of a brace pattern: "a-{008..010}.tar" and "{a,b}.parquet"; bounds keep their leading zeros.

    In an address those of its path only: in credentials and behind "?" they are what they are.
    Raises UserError for braces that are neither a range nor a list, or for more than a million names.
    """
    head, path, query = re.fullmatch(r"(\w+://(?:[^/?#]*@)?)?([^?#]*)(.*)", pattern, re.DOTALL).groups()  # type: ignore[union-attr]
    if not head:
        head, path, query = "", pattern, ""
    parts: list[list[str]] = [[head]]
    for text, braces in re.findall(r"([^{}]+)|\{([^{}]*)\}", path):
        parts.append([text] if text else _alternatives(braces, pattern))
    parts.append([query])
    if math.prod(map(len, parts)) > _MOST_NAMES:
        raise UserError(f"{address(pattern)} stands for more than {_MOST_NAMES:,} files; give fewer a run")
    return ["".join(chosen) for chosen in product(*parts)]


def _alternatives(braces: str, pattern: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
    if bounds is None:
        if "," not in braces:
            raise UserError(
                f"{{{braces}}} in {address(pattern)} is neither a range as {{000..127}} nor a list as {{a,b}}"
            )
        return braces.split(",")
    first, last = bounds.groups()
    if int(first) > int(last):
        raise UserError(f"{{{braces}}} in {address(pattern)} runs backwards; write {{{last}..{first}}}")
    if int(last) - int(first) >= _MOST_NAMES:
        raise UserError(f"{{{braces}}} in {address(pattern)} stands for more than {_MOST_NAMES:,} files")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


@dataclass
class Storage:
    """Reads files by name or address; picklable, since connections are made anew in each process."""

    timeout: float = 20.0
    """Seconds without an answer, or a byte of one, after which a request is given up."""
    tries: int = 8
    """Requests for the same bytes before giving up for good."""
    _state: "_Process | None" = field(default=None, repr=False, compare=False)

    def size(self, name: Path | str) -> int:
        """Bytes of a file. Raises MissingFile, StorageError."""
        if is_url(name):
            if scheme_of(name):
                return self._stores().size(str(name))
            state = self._process()
            if str(name) not in state.sizes:
                self._get(str(name), 0, 1)
            return state.sizes[str(name)]
        try:
            return os.stat(name).st_size
        except OSError as error:
            raise MissingFile(f"{name} cannot be read ({error.strerror}); put it back, or give another path") from None

    def read(self, name: Path | str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer at the file's end. Raises MissingFile, StorageError."""
        if length <= 0:
            return b""
        if scheme_of(name):
            return self._stores().read(str(name), start, length)
        if is_url(name):
            return self._get(str(name), start, length)
        try:
            return self._process().pread(str(name), start, length)
        except OSError as error:
            raise MissingFile(f"{name} cannot be read ({error.strerror}); put it back, or give another path") from None

    def open(self, name: Path | str) -> BinaryIO:
        """A seekable file object, read-only."""
        if is_url(name):
            return cast(BinaryIO, io.BufferedReader(_RemoteFile(self, str(name)), _BUFFER))
        try:
            return Path(name).open("rb")
        except OSError as error:
            raise MissingFile(f"{name} cannot be read ({error.strerror}); put it back, or give another path") from None

    def files(self, folder: str) -> dict[str, str]:
        """Addresses of the files below a folder of an object store by their names. Raises MissingFile, StorageError."""
        return self._stores().files(folder)

    def _stores(self) -> ObjectStores:
        process = self._process()
        if process.stores is None:
            process.stores = ObjectStores(self.timeout, self.tries)
        return process.stores

    def _process(self) -> "_Process":
        if self._state is None or self._state.pid != os.getpid():
            self._state = _Process()
        return self._state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}

    def _get(self, url: str, start: int, length: int) -> bytes:
        from urllib3.exceptions import HTTPError, MaxRetryError
        from urllib3.util import Retry

        kept = self._process().whole.get(url)
        if kept is not None:
            return kept[start : start + length]
        # Pauses of 0, 0.5, 1, 2, … seconds and up to a half more, so that many readers do not come back at one time.
        retry = Retry(total=self.tries - 1, backoff_factor=0.25, backoff_jitter=0.5, backoff_max=30)
        while True:
            try:
                response, body = self._request(url, start, length)
                if response.status not in _PASSING:
                    return self._answer(url, start, length, response, body)
                reason = f"HTTP {response.status} {response.reason or ''}".strip()
            except (HTTPError, OSError) as error:
                reason = _plain_reason(error)
            try:
                retry = retry.increment("GET", url, error=OSError(reason))
            except MaxRetryError:
                raise StorageError(
                    f"{address(url)} could not be read in {self.tries} tries (last: {reason}); look after the "
                    "server and the network and start the same command again, or raise --data.tries and --data.timeout"
                ) from None
            retry.sleep()

    def _request(self, url: str, start: int, length: int) -> tuple[Any, bytes]:
        from urllib3.util import Retry, Timeout

        response = (
            self._process()
            .pool()
            .request(
                "GET",
                _without_credentials(url),
                headers={
                    "Range": f"bytes={start}-{start + length - 1}",
                    "Accept-Encoding": "identity",
                    **_authorization(url),
                },
                preload_content=False,
                decode_content=False,
                retries=Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, raise_on_redirect=True),
                timeout=Timeout(connect=self.timeout, read=self.timeout),
            )
        )
        # A server that drips bytes never meets the time limit between two of them.
        told = response.headers.get("Content-Length", "")
        expected = int(told) if re.fullmatch(r"\d{1,18}", told) else length
        # Whatever the header says: an answer that is longer than what was asked for is not read to its end.
        most = {206: length, 200: _WHOLE_BYTES}.get(response.status, _CHUNK)
        deadline = time.monotonic() + self.timeout + expected / _SLOWEST
        parts: list[bytes] = []
        try:
            if response.status == 200 and expected > _WHOLE_BYTES:
                raise StorageError(
                    f"the server of {address(url)} knows no range requests and the file has {expected:,} bytes; "
                    "serve it from one that does"
                )
            while part := response.read1(_CHUNK):
                parts.append(part)
                most -= len(part)
                if most < 0 and response.status in (200, 206):
                    raise StorageError(
                        f"the server of {address(url)} answers more than the {length:,} bytes asked for; "
                        "serve it from one that knows range requests"
                    )
                if most < 0:
                    break
                if time.monotonic() > deadline:
                    raise OSError(f"stalled: slower than {_SLOWEST // 1024} KiB a second")
        except BaseException:
            response.close()
            raise
        if most < 0:
            response.close()  # the rest of it is not wanted, and the connection cannot be used again
        else:
            response.release_conn()
        return response, b"".join(parts)

    def _answer(self, url: str, start: int, length: int, response: Any, body: bytes) -> bytes:
        """The bytes asked for out of a final answer, whose size of the whole file is kept."""
        sizes = self._process().sizes
        whole = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status in (206, 416) and whole is not None:
            size = int(whole[1])
            if sizes.setdefault(url, size) != size:
                raise StorageError(
                    f"{address(url)} has changed while it was read ({sizes[url]} to {size} bytes); start again"
                )
            expected = 0 if response.status == 416 else min(length, size - start)
            if expected and len(body) != expected:
                raise StorageError(f"{address(url)} answered {len(body)} bytes where {expected} were asked for")
            return body if expected else b""
        if response.status == 200:
            sizes[url] = len(body)
            self._process().keep(url, body)
            return body[start : start + length]
        kind = MissingFile if response.status in (404, 410) else StorageError
        said = f"HTTP {response.status} {response.reason or ''}".strip()
        raise kind(f"{address(url)} cannot be read ({said}); check the address and whether it may be read")


def _without_credentials(url: str) -> str:
    """An address as it is asked for: a client that is given credentials quotes them in its errors."""
    return re.sub(r"^(\w+://)[^/?#]*@", r"\1", url)


def _authorization(url: str) -> dict[str, str]:
    """The header that says the credentials of an address (RFC 7617); nothing where it has none."""
    from urllib.parse import unquote

    from urllib3.util import make_headers

    found = re.match(r"\w+://([^/?#]*)@", url)
    return dict(make_headers(basic_auth=unquote(found[1]))) if found else {}


def _plain_reason(error: Exception) -> str:
    """What a failed request says, without the library's description of its own objects."""
    text = address(short(cast(Exception, getattr(error, "reason", None) or error)))
    text = re.sub(r"(url: [^\s?]*)\?\S*", r"\1", text)  # urllib3 names a path with its query, and no host
    return re.sub(r"^<[^>]*>: |^[\w.]*\([^)]*\): ", "", text)


class _RemoteFile(io.RawIOBase):
    """A remote file in order or by ranges, for libraries that read file objects."""

    def __init__(self, storage: Storage, url: str) -> None:
        super().__init__()
        self._storage, self._url, self._at, self._size = storage, url, 0, storage.size(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        body = self._storage.read(self._url, self._at, min(len(buffer), self._size - self._at))
        buffer[: len(body)] = body
        self._at += len(body)
        return len(body)


class _Process:
    """Open files and connections of one process."""

    def __init__(self) -> None:
        self.pid, self._lock = os.getpid(), threading.Lock()
        self.sizes: dict[str, int] = {}
        self.whole: OrderedDict[str, bytes] = OrderedDict()
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._pool: Any = None
        self.stores: ObjectStores | None = None

    def pread(self, name: str, start: int, length: int) -> bytes:
        with self._lock:  # so that no other thread closes the file meanwhile
            if name not in self._files:
                self._files[name] = cast(BinaryIO, Path(name).open("rb", buffering=0))  # noqa: SIM115
                if len(self._files) > _FILES_OPEN:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(name)
            return os.pread(self._files[name].fileno(), length, start)

    def keep(self, url: str, body: bytes) -> None:
        with self._lock:
            self.whole[url] = body
            while sum(map(len, self.whole.values())) > 2 * _WHOLE_BYTES:
                self.whole.popitem(last=False)

    def pool(self) -> Any:
        with self._lock:
            if self._pool is None:
                import urllib3

                self._pool = urllib3.PoolManager(maxsize=32)
            return self._pool
