"""Parquet shards that training reads: small row groups, so that one picture at random costs little more than itself."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from train.data.formats.parquet import PREPARED

TEXTS = ("key", "source", "caption.list.element", "caption_column.list.element")


def schema(keep: Sequence[str]) -> pa.Schema:
    """Columns of a shard; `keep` are more columns of text."""
    fields = [("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32()), ("key", pa.string())]
    fields += [("source", pa.string()), ("caption", pa.list_(pa.field("element", pa.string())))]
    fields += [("caption_column", pa.list_(pa.field("element", pa.string())))]
    return pa.schema([*fields, *((name, pa.string()) for name in keep)], metadata={PREPARED: b"1"})


class ShardWriter:
    """Writes rows to a file in row groups of `group`; the file is there when `close` has been called, or not at all."""

    def __init__(self, file: Path, keep: Sequence[str], group: int) -> None:
        self.file, self._group, self._schema = file, group, schema(keep)
        self._temporary = temporary(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Pictures are compressed already, and their smallest and largest bytes say nothing.
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression={"image": "NONE"} | dict.fromkeys([*TEXTS, *keep], "ZSTD"),
            use_dictionary=False,
            write_statistics=False,
        )
        self._rows: list[dict[str, Any]] = []
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == self._group:
            self._flush()

    def close(self) -> None:
        """Put the file in its place; without any row there is none."""
        self._flush()
        self._writer.close()
        if not self.count:
            self._temporary.unlink()
            return
        with self._temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(self._temporary, self.file)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=self._group)
            self._rows = []


def without(draft: Path, file: Path, rows: NDArray[np.int64], keep: Sequence[str], group: int) -> int:
    """Write the rows of a draft but for some to a file, as if these had never been there; gives how many."""
    left_out = set(rows.tolist())
    whole = draft.with_suffix(".whole")  # beside the draft, where a kill may leave what it likes
    writer = ShardWriter(whole, keep, group)
    try:
        number = 0
        with pq.ParquetFile(draft) as opened:
            for batch in opened.iter_batches(batch_size=group):
                for row in batch.to_pylist():
                    if number not in left_out:
                        writer.add(row)
                    number += 1
        writer.close()
        os.replace(whole, file)
    except BaseException:
        writer.discard()
        raise
    return writer.count


def temporary(file: Path) -> Path:
    """A name beside a file that no other process takes."""
    return file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def sha256_of(file: Path) -> str:
    """SHA-256 (hex) of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
