"""What device memory is alive, and what was at the peak: by storages, as torch's allocator would hold them."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 512
"""Bytes that the allocator rounds up to (torch's CUDACachingAllocator, kMinBlockSize)."""


@dataclass(frozen=True)
class Held:
    """One storage."""

    nbytes: int
    part: str
    what: str
    """Shape and dtype of the tensor that it was made for."""


class Memory:
    """Storages that are alive, and the largest sum of them since `restart`."""

    def __init__(self) -> None:
        self.live = 0
        self._held: dict[int, Held] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.restart()

    def restart(self) -> None:
        """The peak is what is alive now."""
        self.peak, self.peak_at = self.live, 0
        # What came (or went, negative) in order, so that the peak can be told afterwards.
        self._before = dict(self._held)
        self._log: list[tuple[int, Held | None]] = []
        self._peak_entry = 0

    def track(self, x: Tensor, part: str, launch: int) -> None:
        """Note a tensor's storage, and any change of its size."""
        if x.device.type != "cuda" or x.layout != torch.strided:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        known = self._held.get(key)
        if known is not None and known.nbytes == nbytes:
            return
        self._set(key, Held(nbytes, part, f"{tuple(x.shape)} {str(x.dtype)[6:]}"), launch)
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key))

    def resized(self, storage: Any) -> None:
        """A storage that is held was given another size in place, as FSDP does."""
        key = storage._cdata
        if key in self._held:
            nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
            self._set(key, Held(nbytes, self._held[key].part, self._held[key].what), self.peak_at)

    def at_peak(self) -> list[tuple[str, str, int, int]]:
        """(part that made it, what, count, bytes) alive at the peak, largest first."""
        held = dict(self._before)
        for key, entry in self._log[: self._peak_entry]:
            if entry is None:
                held.pop(key, None)
            else:
                held[key] = entry
        count: Counter[tuple[str, str]] = Counter()
        nbytes: Counter[tuple[str, str]] = Counter()
        for entry in held.values():
            count[entry.part, entry.what] += 1
            nbytes[entry.part, entry.what] += entry.nbytes
        return [(part, what, count[part, what], size) for (part, what), size in nbytes.most_common() if size]

    def _set(self, key: int, entry: Held, launch: int) -> None:
        before = self._held.get(key)
        self._held[key] = entry
        self._log.append((key, entry))
        self.live += entry.nbytes - (before.nbytes if before else 0)
        if self.live > self.peak:
            self.peak, self.peak_at, self._peak_entry = self.live, launch, len(self._log)

    def _gone(self, key: int) -> None:
        self._alive.pop(key, None)
        entry = self._held.pop(key, None)
        if entry is not None:
            self.live -= entry.nbytes
            self._log.append((key, None))
