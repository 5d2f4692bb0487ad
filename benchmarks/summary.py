"""The table at the end of a benchmark run, and the same table from result files: `python -m benchmarks.summary FILE…`.

Times are medians of one launch, the spread is the interquartile range. GB/s and TFLOP/s are those of the op (the bytes
and operations that it needs at least, benchmarks/roofline.py), not of the way it was done; "of floor" is the time that
the machine's measured ceilings allow at best over the time taken. "ours is" says how many times faster our fastest row
of the group is: below 1 we lose. A training step's MFU is that of the denoiser and, in brackets, of all its parts.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.machine import Ceilings
from benchmarks.measure import CPU_NOTE, Row

_HEAD = ("way", "time", "spread", "GB/s", "TFLOP/s", "of floor", "ours is", "peak", "error", "how")
_STEP_HEAD = ("way", "time", "spread", "images/s", "MFU (all)", "of floor", "ours is", "peak", "error", "how")


def lines(rows: Iterable[Row], ceilings: Ceilings) -> list[str]:
    """The whole summary, a block for each op, case, pass and clock."""
    rows = list(rows)
    gigabytes, rate = ceilings.copy_bytes_per_second / 1e9, ceilings.matmul_flop_per_second / 1e12
    out = [
        f"ceilings measured in this run: copy {gigabytes:.4g} GB/s, {ceilings.matmul_dtype} product {rate:.4g} TFLOP/s"
    ]
    if any(row.how == CPU_NOTE for row in rows):
        out.append("no GPU here: tiny sizes that show that every benchmark works; no figure below is a result")
    ordered = sorted(enumerate(rows), key=lambda pair: (_first(rows, pair[1]), pair[0]))
    for group, members in groupby((row for _, row in ordered), key=lambda row: row.group):
        out += ["", " | ".join(part for part in group if part)]
        in_group = list(members)
        out += _aligned([_STEP_HEAD if in_group[0].images else _HEAD, *cells(in_group, ceilings)])
    return out


def cells(group: Sequence[Row], ceilings: Ceilings) -> list[tuple[str, ...]]:
    """The cells of one group's rows, in their order."""
    best = min((row.seconds for row in group if row.ours), default=None)
    made = []
    for row in group:
        if row.how == CPU_NOTE:
            made.append((row.way, duration(row.seconds), *["-"] * 6, f"{row.error:.1e}", row.how))
            continue
        floor = ceilings.floor_seconds(row.nbytes, row.flop)
        made.append(
            (
                row.way,
                duration(row.seconds),
                f"{row.spread / row.seconds:.1%}" if row.seconds else "-",
                *_rates(row, ceilings),
                f"{floor / row.seconds:.1%}" if floor and row.seconds else "-",
                "-" if best is None or row.ours or not best else f"{row.seconds / best:.2f}x",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
                f"{row.error:.1e}",
                row.how,
            )
        )
    return made


def _rates(row: Row, ceilings: Ceilings) -> tuple[str, str]:
    """GB/s and TFLOP/s; of a training step images/s and MFU, that of the denoiser alone and that of all its parts."""
    if not row.seconds:
        return "-", "-"
    if row.images:
        shares = mfu(row, ceilings)
        return f"{row.images / row.seconds:.4g}", f"{shares[0]:.1%} ({shares[1]:.1%})" if shares else "-"
    return (
        f"{row.nbytes / row.seconds / 1e9:.4g}" if row.nbytes else "-",
        f"{row.flop / row.seconds / 1e12:.4g}" if row.flop else "-",
    )


def mfu(row: Row, ceilings: Ceilings) -> tuple[float, float] | None:
    """Operations of the denoiser, and of all parts, a second over the data sheet's rate; None where it is not known.

    Operations are those that are needed: real text tokens, routed blocks at their kept tokens, nothing done twice.
    """
    rate = ceilings.data_sheet_flop_per_second
    if not rate or not row.seconds:
        return None
    return row.denoiser_flop / row.seconds / rate, row.flop / row.seconds / rate


def duration(seconds: float) -> str:
    """Four digits in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def from_json(path: Path) -> tuple[list[Row], Ceilings]:
    """Rows and ceilings of a result file that `--benchmark-json` wrote.

    Raises:
        ValueError: a file that is none of ours.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    names = {field.name for field in fields(Row)}
    infos = [entry.get("extra_info", {}) for entry in content.get("benchmarks", [])]
    infos = [info for info in infos if names <= set(info)]
    if not infos or not content.get("ceilings"):
        raise ValueError(f"{path} is no result file of these benchmarks: it lacks rows or the measured ceilings")
    rows = [Row(**{name: info[name] for name in names}) for info in infos]
    return rows, Ceilings(**content["ceilings"])


def main() -> None:
    parser = argparse.ArgumentParser(description="print the summary of result files")
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        rows, ceilings = from_json(path)
        print(f"# {path}", *lines(rows, ceilings), sep="\n")


def _first(rows: Sequence[Row], row: Row) -> int:
    return next(i for i, other in enumerate(rows) if other.group == row.group)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]


if __name__ == "__main__":
    main()
