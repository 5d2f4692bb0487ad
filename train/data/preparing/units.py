"""A unit of work: rows of the data made into drafts of shards, and a record of what became of each row."""

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.preparing.pictures import Maker, Outcome
from train.data.preparing.plan import Plan, Unit
from train.data.preparing.shards import ShardWriter, sha256_of
from train.side_files import write_whole

_BEAT = 5.0
"""Seconds between two signs of life."""


def make_unit(plan: Plan, unit: Unit, beat: Callable[[], None]) -> dict[str, Any]:
    """Write a unit's drafts, then its record; `beat` is called between rows. Gives what `told` of the record gives.

    Raises:
        UserError: a filter that cannot be worked out for a row, or storage that stays down.
    """
    settings, source = plan.settings, plan.sources[unit.source]
    maker = Maker(settings)
    writers = {
        side: ShardWriter(plan.draft(unit, side), settings.keep_columns, settings.group) for side in settings.sizes
    }
    record = _Record(settings.sizes)
    began = last = time.monotonic()
    try:
        for row in range(unit.first, unit.end):
            outcome = maker.make(source, row)
            record.add(outcome)
            for side, made in outcome.made.items():
                writers[side].add(
                    {
                        "image": made.content,
                        "width": made.size[1],
                        "height": made.size[0],
                        "key": outcome.key or source.index.key(row),
                        "source": source.name,
                        "caption": [text for _, text in outcome.captions],
                        "caption_column": [column for column, _ in outcome.captions],
                        **outcome.kept,
                    }
                )
            if (now := time.monotonic()) - last > _BEAT:
                beat()
                last = now
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    told = record.told(plan, unit)
    record.write(plan.record(unit), told)
    return {**told, "seconds": time.monotonic() - began}


class _Record:
    """What became of each row of a unit."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._digests: dict[int, list[bytes]] = {side: [] for side in sizes}
        self._keys: dict[int, list[bytes]] = {side: [] for side in sizes}
        self._places: dict[int, list[str]] = {side: [] for side in sizes}
        self._dropped: dict[int, dict[str, int]] = {side: {} for side in sizes}
        self._list: list[dict[str, Any]] = []
        self._sizes: dict[int, list[tuple[int, int]]] = {side: [] for side in sizes}

    def add(self, outcome: Outcome) -> None:
        for side, made in outcome.made.items():
            self._digests[side].append(outcome.digest)
            self._keys[side].append(_digest(outcome.key) if outcome.key else bytes(16))
            self._places[side].append(outcome.place)
            self._sizes[side].append(made.size)
        for side, reason in outcome.dropped.items():
            self._dropped[side][reason] = self._dropped[side].get(reason, 0) + 1
            if reason != "filtered":  # which is no fault, and may be most of the data
                self._list.append({"size": side, "row": outcome.place, "reason": reason, "detail": outcome.detail})

    def told(self, plan: Plan, unit: Unit) -> dict[str, Any]:
        """Numbers and hashes as plain values."""
        shards = {}
        for side, digests in self._digests.items():
            draft = plan.draft(unit, side)
            whole = {"sha256": sha256_of(draft), "bytes": draft.stat().st_size} if digests else {}
            shards[str(side)] = {"rows": len(digests), "dropped": self._dropped[side], **whole}
        return {"rows": unit.end - unit.first, "shards": shards, "list": self._list}

    def write(self, file: Path, told: dict[str, Any]) -> None:
        arrays: dict[str, NDArray[Any]] = {"told": np.frombuffer(json.dumps(told).encode(), np.uint8)}
        for side in self._digests:
            arrays[f"digest-{side}"] = np.frombuffer(b"".join(self._digests[side]), np.uint64).reshape(-1, 2)
            arrays[f"key-{side}"] = np.frombuffer(b"".join(self._keys[side]), np.uint64).reshape(-1, 2)
            arrays[f"size-{side}"] = np.array(self._sizes[side], np.int32).reshape(-1, 2)
            text = json.dumps(self._places[side]).encode()
            arrays[f"place-{side}"] = np.frombuffer(text, np.uint8)
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        write_whole(file, stream.getvalue())


class UnitRecord:
    """A unit's record, read back."""

    def __init__(self, file: Path) -> None:
        self._loaded = np.load(file, allow_pickle=False)
        self.told: dict[str, Any] = json.loads(self._loaded["told"].tobytes())

    def digests(self, side: int) -> NDArray[np.uint64]:
        """(kept, 2) digests of the pictures as they were stored."""
        return self._loaded[f"digest-{side}"]

    def keys(self, side: int) -> NDArray[np.uint64]:
        """(kept, 2) digests of the rows' own names; 0 where there is none."""
        return self._loaded[f"key-{side}"]

    def sizes(self, side: int) -> NDArray[np.int32]:
        """(kept, 2) height and width."""
        return self._loaded[f"size-{side}"]

    def places(self, side: int) -> list[str]:
        found: list[str] = json.loads(self._loaded[f"place-{side}"].tobytes())
        return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
