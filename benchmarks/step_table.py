"""Counted steps to the README's table: what `python -m benchmarks.dry_step PRESET --out FILE` wrote, as Markdown.

python -m benchmarks.dry_step prx-512 --out 512.json
python -m benchmarks.dry_step prx-1024 --out 1024.json
python -m benchmarks.step_table 512.json 1024.json                      # prints the table
python -m benchmarks.step_table 512.json 1024.json --write README.md    # puts it into the marked region
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table, replaced

BEGIN, END = "<!-- dry_step: begin -->", "<!-- dry_step: end -->"
NOT_COUNTED = "Not counted at this commit yet: `python -m benchmarks.step_table` fills this in."
PARTS = {
    "denoiser": "denoiser, forward and backward",
    "optimizer": "optimizer: Muon, AdamW, clipping",
    "lpips": "LPIPS",
    "repa": "REPA teacher",
    "pdino": "P-DINO",
    "backward": "backward outside of these",
    "step": "noise, times, loss, the rest",
}
"""What the parts that `dry_step` names are called in the table; a part that is not here keeps its name."""
FIGURES = ("launches", "GB", "TFLOP", "expected_ms")


def load(path: Path) -> dict[str, Any]:
    """What `--out` wrote (`benchmarks.absent_gpu.report.facts`).

    Raises:
        ValueError: the file is something else.
    """
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or not {"setting", "parts", "total", "memory", "versions"} <= found.keys():
        raise ValueError(f"{path} is not what python -m benchmarks.dry_step PRESET --out FILE writes")
    return found


def markdown(steps: Sequence[dict[str, Any]]) -> str:
    """A table of part x (launches, GB, TFLOP, expected ms) for one or more counted steps, and what it stands on.

    Args:
        steps: as `load` gives them. Parts are in the order of their predicted time, the dearest first.
    """
    columns = [{**by_part(step), "**whole step**": step["total"]} for step in steps]
    names = sorted({name for column in columns for name in column}, key=lambda name: _rank(name, columns))
    head = [""] + [f"{_short(step)}: launches | GB | TFLOP | expected ms" for step in steps]
    rows = [
        [PARTS.get(name, name), *(cell for column in columns for cell in _cells(column.get(name)))] for name in names
    ]
    flat = [cell for group in head for cell in group.split(" | ")]
    return "\n\n".join([markdown_table(flat, rows), *(_foot(step) for step in steps)])


def by_part(step: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of each part, summed over the kinds of its launches."""
    sums: dict[str, dict[str, float]] = {}
    for row in step["parts"]:
        part = sums.setdefault(row["part"], dict.fromkeys(FIGURES, 0.0))
        for figure in FIGURES:
            part[figure] += row[figure]
    return sums


def _rank(name: str, columns: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """The whole comes first, for it is the dearest."""
    return -sum(column[name]["expected_ms"] for column in columns if name in column), name


def _cells(part: dict[str, float] | None) -> list[str]:
    if part is None:
        return ["–"] * len(FIGURES)
    return [f"{part['launches']:,.0f}", f"{part['GB']:.1f}", f"{part['TFLOP']:.1f}", f"{part['expected_ms']:.1f}"]


def _short(step: dict[str, Any]) -> str:
    setting = step["setting"]
    small = ", small form" if setting["small"] else ""
    ranks = "" if setting["ranks"] == 1 else f", rank 0 of {setting['ranks']}"
    return f"{setting['preset']} × {setting['batch']}{ranks}{small}"


def _foot(step: dict[str, Any]) -> str:
    versions, waits = step["versions"], sum(step["waits"].values())
    return (
        f"{_short(step)}: {step['memory']['peak_GB']:.1f} GB of memory at the peak, {step['graph_breaks']} graph "
        f"breaks, {waits} waits of the host; torch {versions['torch'].split('+')[0]}, Triton {versions['triton']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", type=Path, nargs="+", metavar="JSON", help="what dry_step --out wrote, one a preset")
    parser.add_argument("--write", type=Path, metavar="README", help="replace the marked region of this file")
    asked = parser.parse_args()
    try:
        made = markdown([load(path) for path in asked.steps])
        if asked.write:
            asked.write.write_text(replaced(asked.write.read_text(), made, BEGIN, END))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(made)


if __name__ == "__main__":
    main()
