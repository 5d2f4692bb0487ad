"""The report's figures: rooflines by kernel, step times as stacked bars, projected hours; all from rows of a GPU."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import project
from benchmarks.machine import Ceilings
from benchmarks.measure import Row
from benchmarks.project import BUDGET_HOURS, Speed
from train.run.hours import Assumptions

Measured = tuple[list[Row], Ceilings, Path]
NODES = (1, 2, 4, 8, 16)
WHOLE, WITHOUT = "training step, all ingredients", "training step, without optimizer"


def draw(results: Sequence[Measured], folder: Path | None) -> list[str]:
    """Names of the figures that the results have the rows for; with a folder they are drawn there as PNG."""
    names = []
    for rows, ceilings, path in results:
        kernels = [row for row in rows if row.clock == "device" and row.ours and not row.images]
        if kernels:
            names.append(_save(folder, f"roofline-{path.stem}.png", _roofline, kernels, ceilings))
        if step_parts(rows):
            names.append(_save(folder, f"step-{path.stem}.png", _steps, rows))
    try:
        speed = project.measured([path for _, _, path in results])
    except ValueError:
        return names
    return [*names, _save(folder, "projected-hours.png", _hours, speed)]


def step_parts(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """By (case, way): ms of forward, teachers and backward, and of optimizer and averages, where both were timed."""
    seconds = {(row.op, row.case, row.way): row.seconds * 1e3 for row in rows}
    return {
        (case, way): (seconds[WITHOUT, case, way], max(whole - seconds[WITHOUT, case, way], 0.0))
        for (op, case, way), whole in seconds.items()
        if op == WHOLE and (WITHOUT, case, way) in seconds
    }


def hours(speed: Speed) -> list[tuple[int, list[float]]]:
    """(GPUs, hours of each stage) on nodes of eight, for several numbers of them."""
    default = Assumptions()
    made = []
    for nodes in NODES:
        assumed = replace(default, network=replace(default.network, nodes=nodes))
        stages = project.project(speed, assumed)
        made.append((nodes * default.network.gpus, [s.hours for s in stages]))
    return made


def _save(folder: Path | None, name: str, make: Any, *arguments: Any) -> str:
    if folder is None:
        return name
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    make(axes, *arguments)
    figure.savefig(folder / name, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return name


def _roofline(axes: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Rate over operations a byte; ops that only move bytes stand at the left, by their bytes."""
    bandwidth, rate = ceilings.copy_bytes_per_second, ceilings.matmul_flop_per_second
    least = 0.1
    for op in dict.fromkeys(row.op for row in rows):
        found = [row for row in rows if row.op == op and row.nbytes]
        intensity = [max(row.flop / row.nbytes, least) for row in found]
        reached = [x * row.nbytes / row.seconds / 1e12 for x, row in zip(intensity, found, strict=True)]
        axes.plot(intensity, reached, "o", label=op)
    edge = rate / bandwidth
    axes.plot([least, edge, 100 * edge], [least * bandwidth / 1e12, rate / 1e12, rate / 1e12], "k-", label="measured")
    axes.set(xscale="log", yscale="log", xlabel=f"operations a byte ({least:g}: none)", ylabel="TFLOP/s")
    axes.legend(fontsize=7)


def _steps(axes: Any, rows: Sequence[Row]) -> None:
    parts = step_parts(rows)
    labels = [f"{way}\n{case}" for case, way in parts]
    first, second = ([pair[i] for pair in parts.values()] for i in range(2))
    axes.barh(labels, first, label="forward, teachers, backward")
    axes.barh(labels, second, left=first, label="optimizer and averages (one GPU's: not spread over ranks)")
    axes.invert_yaxis()
    axes.set(xlabel="ms a step on one GPU")
    axes.legend(fontsize=7)


def _hours(axes: Any, speed: Speed) -> None:
    found = hours(speed)
    gpus = [str(count) for count, _ in found]
    below = [0.0] * len(found)
    for i, stage in enumerate(("512 px", "1024 px")):
        heights = [stages[i] for _, stages in found]
        axes.bar(gpus, heights, bottom=below, label=stage)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.axhline(BUDGET_HOURS, color="k", linestyle="--", label="PRX Part 3, 32 H200: 24 h")
    axes.set(xlabel="GPUs, eight a node", ylabel=f"projected hours (steps {speed.known.split(':')[0]})")
    axes.legend(fontsize=7)
