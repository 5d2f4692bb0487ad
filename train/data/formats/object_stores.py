"""Files on the Hugging Face hub and in buckets of S3 and Google Cloud, through fsspec: lists, sizes and ranges.

Credentials are the affair of each library, by its own conventions: `hf auth login` or HF_TOKEN; ~/.aws or AWS_…; the
application default credentials. Nothing of them is asked for, kept or shown here.

http and https stay with storage.py. fsspec's reader of them takes a whole file where a server knows no ranges, and a
server that drips bytes holds it for ever.
"""

import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from train.data.formats.storage_errors import MissingFile, StorageError
from train.data.rows import short
from train.errors import UserError
from train.shown import address

EXTRAS = {"hf": "hf", "s3": "s3", "gs": "gcs", "gcs": "gcs"}
"""Which extra of this package a scheme needs."""
_LIBRARIES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_LOGIN = {
    "hf": "run `hf auth login` or set HF_TOKEN, and accept the terms of the data there",
    "s3": "set up ~/.aws or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gcs": "run `gcloud auth application-default login`",
}
_PASSING = {408, 425, 429}
"""HTTP states below 500 that another try may change."""
_NETWORKS = ("aiobotocore", "aiohttp", "asyncio", "botocore", "fsspec", "gcsfs", "httpcore", "httpx", "urllib3")
"""Libraries whose errors are the network's."""
_LONGEST_PAUSE = 30.0
Found = TypeVar("Found")


def scheme_of(path: object) -> str | None:
    """The scheme of an object store's address, None for everything else."""
    found = re.match(r"(\w+)://", str(path))
    scheme = found[1] if found else ""  # in small letters, as the libraries want it
    return scheme if scheme in EXTRAS else None


class ObjectStores:
    """The stores that one process reads from; their connections do not survive a fork."""

    def __init__(self, timeout: float, tries: int) -> None:
        self._timeout, self._tries, self._lock = timeout, tries, threading.Lock()
        self._open: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def size(self, url: str) -> int:
        """Bytes of a file. Raises MissingFile, StorageError."""
        if url not in self._sizes:
            told = self._ask(url, lambda store: store.info(url))
            if told.get("type") == "directory":
                raise MissingFile(f"{address(url)} is a folder; give a file in it, or the folder as --data.path")
            self._sizes[url] = int(told["size"])
        return self._sizes[url]

    def read(self, url: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on, fewer at the file's end. Raises MissingFile, StorageError."""
        end = min(start + length, self.size(url))
        if end <= start:
            return b""

        def take(store: Any) -> bytes:
            content = bytes(store.cat_file(url, start=start, end=end))
            if len(content) != end - start:
                raise OSError(f"answered {len(content)} bytes where {end - start} were asked for")
            return content

        return self._ask(url, take)

    def files(self, folder: str) -> dict[str, str]:
        """Addresses of all files below a folder by their names in it, sorted; hidden ones are left out.

        Raises MissingFile, StorageError.
        """
        scheme = folder.partition("://")[0]
        found: dict[str, dict[str, Any]] = self._ask(folder, lambda store: store.find(folder, detail=True))
        root = self._ask(folder, lambda store: str(store._strip_protocol(folder))).strip("/")
        named = dict[str, str]()
        for place, told in sorted(found.items()):
            name = place.strip("/").removeprefix(root).lstrip("/")
            if not name or any(part.startswith(".") for part in name.split("/")):
                continue
            url = f"{scheme}://{place.strip('/')}"
            named[name] = url
            if told.get("size") is not None:
                self._sizes[url] = int(told["size"])
        if not named:
            raise MissingFile(f"there is nothing at {address(folder)}; give a folder with parquet, tar or MDS files")
        return named

    def _store(self, url: str) -> Any:
        scheme = scheme_of(url)
        assert scheme is not None
        with self._lock:
            if scheme not in self._open:
                import fsspec

                options = {"connect_timeout": self._timeout, "read_timeout": self._timeout}
                more = {"config_kwargs": options} if scheme == "s3" else {}
                try:
                    self._open[scheme] = fsspec.filesystem(scheme, skip_instance_cache=True, **more)
                except ImportError:
                    raise UserError(
                        f"{scheme}:// needs a library that is not installed; uv sync --extra {EXTRAS[scheme]}, or "
                        f"pip install {_LIBRARIES[scheme]}"
                    ) from None
            return self._open[scheme]

    def _ask(self, url: str, call: Callable[[Any], Found]) -> Found:
        """What a call gives; one that fails for a passing reason is made again, after a pause that grows."""
        shown, scheme, reason = address(url), EXTRAS[str(scheme_of(url))], ""
        for attempt in range(self._tries):
            try:
                return call(self._store(url))
            except FileNotFoundError as error:
                raise MissingFile(f"there is no {shown} that may be read ({_said(error)}); {_LOGIN[scheme]}") from None
            except UserError:
                raise
            except Exception as error:  # each library has errors of its own
                reason = _said(error)
                if _is_refusal(error):
                    raise StorageError(f"{shown} may not be read ({reason}); {_LOGIN[scheme]}") from None
                if not _may_pass(error):
                    raise StorageError(f"{shown} cannot be read ({reason})") from None
            if attempt + 1 < self._tries:
                time.sleep(min(_LONGEST_PAUSE, 0.25 * 2**attempt) * random.uniform(1, 1.5))
        raise StorageError(
            f"{shown} could not be read in {self._tries} tries (last: {reason}); look after the network and start the "
            "same command again, or raise --data.tries"
        )


def _said(error: Exception) -> str:
    """The first line of an error, without what an address may carry."""
    return address(short(error)) or type(error).__name__


def _state(error: Exception) -> int | None:
    """The HTTP state behind an error, where its library tells it."""
    state = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    return state if isinstance(state, int) else None


def _is_refusal(error: Exception) -> bool:
    names = [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, PermissionError) or _state(error) in (401, 403) or any("Credential" in n for n in names)


def _may_pass(error: Exception) -> bool:
    """Whether another try may do better: the network, an overloaded server, an answer that was cut."""
    state = _state(error)
    if state is not None:
        return state >= 500 or state in _PASSING
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError) or module in _NETWORKS
