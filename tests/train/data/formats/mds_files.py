"""Writes MDS shards, so that tests can make every kind, broken ones too."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

FIXED = {"int": 8, "int32": 4, "float64": 8}


def shard_bytes(columns: Mapping[str, str], samples: Sequence[Mapping[str, bytes]]) -> bytes:
    """A shard of samples whose columns are encoded already."""
    bodies = []
    for sample in samples:
        varying = [len(sample[name]) for name, encoding in columns.items() if encoding not in FIXED]
        bodies.append(struct.pack(f"<{len(varying)}I", *varying) + b"".join(sample[name] for name in columns))
    text = json.dumps({"column_names": list(columns)}).encode()
    first = 4 + 4 * (len(bodies) + 1) + len(text)
    places = [first + sum(map(len, bodies[:n])) for n in range(len(bodies) + 1)]
    return struct.pack(f"<{len(places) + 1}I", len(bodies), *places) + text + b"".join(bodies)


def write_mds(
    folder: Path,
    columns: Mapping[str, str],
    shards: Sequence[Sequence[Mapping[str, bytes]]],
    *,
    packed: bool = False,
    **changes: Any,
) -> Path:
    """A set of shards with its index.json; `changes` overwrite what that says of each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, samples in enumerate(shards):
        content, name = shard_bytes(columns, samples), f"shard.{number:05}.mds"
        entry: dict[str, Any] = {
            "column_names": list(columns),
            "column_encodings": list(columns.values()),
            "column_sizes": [FIXED.get(encoding) for encoding in columns.values()],
            "compression": "zstd:3" if packed else None,
            "format": "mds",
            "hashes": [],
            "raw_data": {"basename": name, "bytes": len(content), "hashes": {}},
            "samples": len(samples),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if packed:
            content, name = pa.compress(content, "zstd", asbytes=True), f"{name}.zstd"
            entry["zip_data"] = {"basename": name, "bytes": len(content), "hashes": {}}
        (folder / name).write_bytes(content)
        listed.append({**entry, **changes})
    (folder / "index.json").write_text(json.dumps({"shards": listed, "version": 2}))
    return folder
