"""Result files to the README's tables and figures: nothing in them is written by hand.

python -m benchmarks.report                      # the Markdown of benchmarks/results/*.json
python -m benchmarks.report --write README.md    # replaces the marked region, draws the figures beside the results
python -m benchmarks.report --check README.md    # fails where the README and the result files differ

Every shape is in the tables, those where a peer is faster too. Without rows from a GPU it says "not measured yet".
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import project, summary
from benchmarks.figures import draw
from benchmarks.machine import ROOT, Ceilings
from benchmarks.measure import CPU_NOTE, Row
from benchmarks.summary import duration, mfu
from train.run.hours import Assumptions

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks.report: begin -->", "<!-- benchmarks.report: end -->"
NOT_MEASURED = "Not measured yet: `benchmarks/results/` holds no run on a GPU."


@dataclass(frozen=True)
class Result:
    """One result file with rows from a GPU."""

    path: Path
    rows: list[Row]
    ceilings: Ceilings
    machine: dict[str, Any]


def load(folder: Path) -> list[Result]:
    """The result files of a folder that hold rows from a GPU, by name; profiles are none.

    Raises:
        ValueError: a file that is neither.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if "kinds_us" in content:
            continue
        rows, ceilings = summary.from_json(path)
        rows = [row for row in rows if row.how != CPU_NOTE]
        if rows:
            found.append(Result(path, rows, ceilings, content["machine_info"]))
    return found


def markdown(results: Sequence[Result], figures: Sequence[str] = ()) -> str:
    """The region's content; `figures` are paths as the README names them."""
    if not results:
        return NOT_MEASURED
    parts = [_of_file(result) for result in results]
    try:
        speed = project.measured([result.path for result in results])
        parts.append("```\n" + "\n".join(project.lines(speed, Assumptions())) + "\n```")
    except ValueError:
        parts.append("Hours of the whole recipe: not measured yet, a step of both stages is needed.")
    parts += [f"![{Path(figure).stem}]({figure})" for figure in figures]
    return "\n\n".join(parts)


def _of_file(result: Result) -> str:
    machine = result.machine
    name, torch, commit = machine["gpu"]["name"], machine["torch"], machine["commit"][:10]
    parts = [
        f"**{result.path.name}**: {name}, torch {torch}, commit `{commit}`; "
        f"measured in the same run: copy {result.ceilings.copy_bytes_per_second / 1e12:.2f} TB/s, "
        f"{result.ceilings.matmul_dtype} product {result.ceilings.matmul_flop_per_second / 1e12:.0f} TFLOP/s."
    ]
    # Of rows with two clocks the device's: that of the host is in the file.
    ordered = [row for row in result.rows if row.clock == "device" or row.which == "step"]
    steps, kernels = ([row for row in ordered if bool(row.images) == wanted] for wanted in (True, False))
    head: tuple[str, ...]
    if steps:
        head = ("step", "case", "way", "time", "images/s", "MFU (all parts)", "memory", "ours is", "error")
        parts.append(markdown_table(head, _step_cells(steps, result.ceilings)))
    if kernels:
        head = ("op", "case", "pass", "way", "time", "of floor", "ours is", "error")
        parts.append(markdown_table(head, _kernel_cells(kernels, result.ceilings)))
    return "\n\n".join(parts)


def _step_cells(rows: Sequence[Row], ceilings: Ceilings) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = []
    for row, ours_is in _compared(rows):
        shares = mfu(row, ceilings)
        made.append(
            (
                row.op.removeprefix("training step, "),
                row.case,
                row.way,
                duration(row.seconds),
                f"{row.images / row.seconds:.4g}",
                f"{shares[0]:.1%} ({shares[1]:.1%})" if shares else "-",
                "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f} GiB",
                ours_is,
                f"{row.error:.1e}",
            )
        )
    return made


def _kernel_cells(rows: Sequence[Row], ceilings: Ceilings) -> list[tuple[str, ...]]:
    return [
        (
            row.op,
            row.case,
            row.which,
            row.way if row.how == "graph" else f"{row.way} ({row.how.partition(':')[0]})",
            duration(row.seconds),
            f"{ceilings.floor_seconds(row.nbytes, row.flop) / row.seconds:.1%}",
            ours_is,
            f"{row.error:.1e}",
        )
        for row, ours_is in _compared(rows)
    ]


def _compared(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Rows by group, each peer with how many times faster our fastest is: below 1 it is set in bold."""
    order = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    made = []
    for _, group in groupby(sorted(rows, key=lambda row: order[row.group]), key=lambda row: row.group):
        members = list(group)
        best = min((row.seconds for row in members if row.ours), default=None)
        for row in members:
            times = None if best is None or row.ours else row.seconds / best
            shown = "" if times is None else f"{times:.2f}x" if times >= 1 else f"**{times:.2f}x**"
            made.append((row, shown))
    return made


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, cells as they are but for bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def replaced(text: str, region: str, begin: str = BEGIN, end: str = END) -> str:
    """A README's text with the region between two marks replaced.

    Raises:
        ValueError: the marks are not there once each, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file needs one line {begin} and one {end} behind it; the report goes between them")
    return text[: text.index(begin) + len(begin)] + f"\n{region}\n" + text[text.index(end) :]


def report(folder: Path, readme: Path | None, *, write: bool) -> str:
    """The Markdown of a folder's results; with `write` it is put into the README, and the figures beside the results.

    Raises:
        ValueError: a file that is no result, or a README without marks.
        SystemExit: not `write`, and the README holds another report than the result files give.
    """
    results = load(folder)
    figures = draw([(result.rows, result.ceilings, result.path) for result in results], folder if write else None)
    names = [_as_named(folder / figure, readme) for figure in figures]
    made = markdown(results, names)
    if readme is None:
        return made
    text = readme.read_text()
    wanted = replaced(text, made)
    if write:
        readme.write_text(wanted)
    elif text != wanted or any(not (folder / figure).exists() for figure in figures):
        raise SystemExit(f"{readme} and the files of {folder} differ; run python -m benchmarks.report --write {readme}")
    return made


def _as_named(figure: Path, readme: Path | None) -> str:
    base = (readme.parent if readme else ROOT).resolve()
    path = figure.resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", type=Path, metavar="README", help="replace the marked region of this file")
    what.add_argument("--check", type=Path, metavar="README", help="fail where this file's region is another")
    asked = parser.parse_args()
    try:
        print(report(asked.results, asked.write or asked.check, write=asked.write is not None))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
