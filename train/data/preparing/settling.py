"""What needs all units: duplicates, which only then are known, the shards' last form, and the manifest."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.preparing.plan import MANIFEST, Plan, Unit
from train.data.preparing.shards import sha256_of, without
from train.data.preparing.units import UnitRecord
from train.side_files import write_whole

DROPPED = "dropped.jsonl"
_DUPLICATE = {1: "duplicate key", 2: "duplicate picture"}


def duplicates_file(plan: Plan) -> Path:
    return plan.work / "duplicates.npz"


def find_duplicates(plan: Plan, beat: Callable[[], None]) -> None:
    """Write which rows of which drafts are duplicates: of rows with one key or one picture all but the first kept one.

    Rows are looked at in the order of the sources, so that the answer is the same whoever asks.
    """
    found: dict[str, NDArray[Any]] = {}
    for side in plan.settings.sizes:
        parts = []
        for unit in plan.units:
            record = UnitRecord(plan.record(unit))
            parts.append((record.keys(side), record.digests(side)))
            beat()
        counts = [len(keys) for keys, _ in parts]
        keys, digests = (np.concatenate([part[n] for part in parts]) for n in (0, 1))
        kinds = np.zeros(len(keys), np.uint8)
        if plan.settings.duplicates == "drop":
            kinds = _kinds(keys, digests)
        numbers = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(keys)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
        rows = np.flatnonzero(kinds)
        found[str(side)] = np.stack([numbers[rows], within[rows], kinds[rows]], axis=1).astype(np.int64)
        beat()
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **found)
    write_whole(duplicates_file(plan), stream.getvalue())


def _kinds(keys: NDArray[np.uint64], digests: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """(rows,) 0 for a row that is kept, else the number in `_DUPLICATE` of why not."""
    repeated = _repeated(digests) | (_repeated(keys) & keys.any(axis=1))
    kinds = np.zeros(len(keys), np.uint8)
    seen_keys: set[bytes] = set()
    seen_digests: set[bytes] = set()
    for row in np.flatnonzero(repeated).tolist():
        key, digest = keys[row].tobytes(), digests[row].tobytes()
        if keys[row].any() and key in seen_keys:
            kinds[row] = 1
        elif digest in seen_digests:
            kinds[row] = 2
        else:
            seen_keys.add(key)
            seen_digests.add(digest)
    return kinds


def _repeated(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(rows,) whether a row of (rows, 2) values comes more than once."""
    order = np.lexsort((values[:, 1], values[:, 0]))
    ordered = values[order]
    same = (ordered[1:] == ordered[:-1]).all(axis=1)
    found = np.zeros(len(values), bool)
    found[order[1:][same]] = True
    found[order[:-1][same]] = True
    return found


def settle(plan: Plan, unit: Unit, duplicates: dict[int, NDArray[np.int64]]) -> None:
    """Put a unit's shards in their places, without duplicates, then write what is known of them."""
    record = UnitRecord(plan.record(unit))
    listed = list(record.told["list"])
    shards: dict[str, Any] = {}
    for side in plan.settings.sizes:
        told = record.told["shards"][str(side)]
        draft, file = plan.draft(unit, side), plan.out / str(side) / plan.shard(unit)
        file.parent.mkdir(exist_ok=True)
        mine = duplicates[side][duplicates[side][:, 0] == unit.number]
        places, dropped = record.places(side), dict(told["dropped"])
        for _, row, kind in mine.tolist():
            reason = _DUPLICATE[kind]
            dropped[reason] = dropped.get(reason, 0) + 1
            listed.append({"size": side, "row": places[row], "reason": reason, "detail": ""})
        sizes = np.delete(record.sizes(side), mine[:, 1], axis=0)
        shards[str(side)] = {"dropped": dropped, "sizes": _counts(sizes)}
        if not len(sizes):
            draft.unlink(missing_ok=True)
            continue
        if len(mine):
            # A draft that is not there any more was put in its place by a worker that then was stopped.
            if draft.exists() or not file.exists():
                without(draft, file, mine[:, 1], plan.settings.keep_columns, plan.settings.group)
            told = {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        elif draft.exists():
            draft.replace(file)
        shards[str(side)] |= {
            "file": f"{side}/{plan.shard(unit)}",
            "rows": len(sizes),
            "bytes": told["bytes"],
            "sha256": told["sha256"],
        }
    write_whole(plan.settled(unit), json.dumps({"rows": record.told["rows"], "shards": shards, "list": listed}))
    for side in plan.settings.sizes:
        plan.draft(unit, side).unlink(missing_ok=True)


def finish(plan: Plan) -> dict[str, Any]:
    """Write the manifest and the list of what was dropped, and remove what is not needed any more."""
    manifest = plan.content()
    sizes: dict[str, Any] = {}
    lines: list[bytes] = []
    every = [json.loads(plan.settled(unit).read_bytes()) for unit in plan.units]
    for side in map(str, plan.settings.sizes):
        dropped: dict[str, int] = {}
        counts: dict[str, int] = {}
        shards: list[dict[str, Any]] = []
        for settled in every:
            told = settled["shards"][side]
            _add(dropped, told["dropped"])
            _add(counts, told["sizes"])
            if "file" in told:
                shards.append({name: told[name] for name in ("file", "rows", "bytes", "sha256")})
        sizes[side] = {
            "seen": sum(settled["rows"] for settled in every),
            "kept": sum(shard["rows"] for shard in shards),
            "dropped": dict(sorted(dropped.items())),
            "bytes": sum(shard["bytes"] for shard in shards),
            "buckets": dict(sorted(counts.items())),
            "shards": shards,
        }
    for settled in every:
        lines += [json.dumps(entry).encode() + b"\n" for entry in settled["list"]]
    manifest["left out"] = [problem for source in plan.sources for problem in source.index.problems]
    manifest["sizes"] = sizes
    write_whole(plan.out / DROPPED, b"".join(lines), aside=plan.work)
    write_whole(plan.out / MANIFEST, json.dumps(manifest, indent=1), aside=plan.work)
    shutil.rmtree(plan.work, ignore_errors=True)
    return manifest


def load_duplicates(plan: Plan) -> dict[int, NDArray[np.int64]]:
    """By side (rows, 3): unit, row of its draft, kind."""
    with np.load(duplicates_file(plan), allow_pickle=False) as loaded:
        return {side: loaded[str(side)] for side in plan.settings.sizes}


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def _counts(sizes: NDArray[np.int32]) -> dict[str, int]:
    found, counts = np.unique(sizes, axis=0, return_counts=True)
    return {f"{height}x{width}": int(n) for (height, width), n in zip(found.tolist(), counts.tolist(), strict=True)}
