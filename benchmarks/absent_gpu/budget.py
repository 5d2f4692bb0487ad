"""What a step may cost: small text files that a person reads in a diff, and how a counted step is held to them.

A file holds figures, GB by part, and every group of kernels. Figures that rise by more than `SLACK` fail; the kernels
say which are new or grew. Inductor's kernels depend on torch, so a budget holds for the versions that it names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.absent_gpu.report import title

FOLDER = Path(__file__).resolve().parents[1] / "budgets"
SLACK = 0.01
_KERNELS = "kernel"


def path_of(setting: dict[str, Any]) -> Path:
    """The file of a setting."""
    ranks = f"{setting['ranks']}-rank" + ("s" if setting["ranks"] > 1 else "")
    return FOLDER / f"{setting['preset']}.{ranks}{'.small' if setting['small'] else ''}.txt"


def figures(found: dict[str, Any]) -> dict[str, float]:
    """What is held to the budget."""
    total = found["total"]
    held: dict[str, float] = {
        "launches": total["launches"], "GB": total["GB"], "TFLOP": total["TFLOP"],
        "expected ms": total["expected_ms"], "peak GB": found["memory"]["peak_GB"],
        "GB between steps": found["memory"]["between_steps_GB"],
        "graphs": len(found["graphs"]), "graph breaks": found["graph_breaks"],
        "recompilations": sum(found["recompilations"].values()), "fallbacks": sum(found["fallbacks"].values()),
        "waits": sum(found["waits"].values()), "host kernels": sum(found["kernels_on_the_host"].values()),
        "wrong layouts": len(found["wrong_layouts"]),
    }  # fmt: skip
    if found["builds"]:
        held["failed builds"] = sum(bool(build["error"]) for build in found["builds"])
        held["spilling kernels"] = len(found["spilling"])
    parts = {f"GB {row['part']}, {row['kind']}": row["GB"] for row in found["parts"]}
    return held | dict(sorted(parts.items()))


def kernels(found: dict[str, Any]) -> dict[str, tuple[int, float, float]]:
    """(launches, GB, TFLOP) of each group of kernels: by part, kind and name."""
    groups: dict[str, tuple[int, float, float]] = {}
    for row in found["kernels"]:
        if row["kind"] != "host":
            key = f"{row['part']}, {row['kind']}, {row['name']}"
            before = groups.get(key, (0, 0.0, 0.0))
            new = (row["launches"], row["GB"], row["TFLOP"])
            groups[key] = tuple(a + b for a, b in zip(before, new, strict=True))
    return dict(sorted(groups.items()))


def text(found: dict[str, Any]) -> str:
    """The file."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    setting = found["setting"]
    yield f"# {title(setting)}"
    yield "# Counted on a CPU, see benchmarks/dry_step.py. Write it anew with:"
    yield f"#   python -m benchmarks.dry_step {command(setting)} --update"
    yield f"# {versions(found)}"
    yield ""
    yield from (f"{value:>12.6g}  {name}" for name, value in figures(found).items())
    yield ""
    yield "# launches, GB, TFLOP of each kernel"
    for name, (launches, size, flop) in kernels(found).items():
        yield f"{_KERNELS} {launches:>5} {size:>9.4f} {flop:>8.4f}  {name}"


def command(setting: dict[str, Any]) -> str:
    """What was typed."""
    parts = [setting["preset"], f"--batch {setting['batch']}"]
    if setting["ranks"] > 1:
        parts.append(f"--ranks {setting['ranks']} --nodes {setting['nodes']}")
    return " ".join([*parts, *(["--small"] if setting["small"] else [])])


def versions(found: dict[str, Any]) -> str:
    """Whose kernels these are: minor releases of torch and Triton."""
    short = {name: ".".join(found["versions"][name].split(".")[:2]) for name in ("torch", "triton")}
    return f"torch {short['torch']}, Triton {short['triton']}"


def read(content: str) -> tuple[str, dict[str, float], dict[str, tuple[int, float, float]]]:
    """(versions, figures, kernels) of a file's text."""
    held: dict[str, float] = {}
    groups: dict[str, tuple[int, float, float]] = {}
    made_with = ""
    for line in content.splitlines():
        if line.startswith("# torch "):
            made_with = line.removeprefix("# ")
        elif line.startswith(f"{_KERNELS} "):
            _, launches, size, flop, name = line.split(maxsplit=4)
            groups[name] = (int(launches), float(size), float(flop))
        elif line.strip() and not line.startswith("#"):
            value, name = line.split(maxsplit=1)
            held[name] = float(value)
    return made_with, held, groups


def over(found: dict[str, Any], content: str) -> list[str]:
    """What a counted step costs more than its budget allows, a sentence each; empty where it keeps to it."""
    _, allowed, known = read(content)
    rises = [
        f"{name}: {value:.6g}, the budget is {allowed.get(name, 0.0):.6g}"
        for name, value in figures(found).items()
        if value > allowed.get(name, 0.0) * (1 + SLACK) + 1e-9
    ]
    return [*rises, *_grown(kernels(found), known)] if rises else []


def under(found: dict[str, Any], content: str) -> list[str]:
    """Figures that fell: the budget should be written anew, so that they stay there."""
    _, allowed, _ = read(content)
    now = figures(found)
    return [
        f"{name}: {now.get(name, 0.0):.6g}, the budget is {value:.6g}"
        for name, value in allowed.items()
        if now.get(name, 0.0) < value * (1 - SLACK) - 1e-9
    ]


def _grown(now: dict[str, tuple[int, float, float]], known: dict[str, tuple[int, float, float]]) -> Iterator[str]:
    for name, (launches, size, flop) in sorted(now.items(), key=lambda item: -item[1][1]):
        if name not in known:
            yield f"    new: {launches} x {name}, {size:.3f} GB, {flop:.3f} TFLOP"
        else:
            before = known[name]
            if any(a > b * (1 + SLACK) + 1e-4 for a, b in zip((launches, size, flop), before, strict=True)):
                yield f"    grew: {name}: {before[0]} → {launches} launches, {before[1]:.3f} → {size:.3f} GB"
