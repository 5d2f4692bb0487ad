"""A counted step as JSON and as the text that is printed."""

import platform
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from benchmarks.absent_gpu import costs
from benchmarks.absent_gpu.builds import Build, spilling
from benchmarks.absent_gpu.recorder import Launch
from benchmarks.absent_gpu.trainer import FILL, SMALL_DEPTH, Counted, Setting

DEAREST = 30


def facts(counted: Counted, builds: list[Build]) -> dict[str, Any]:
    """All that is known of a counted step, as JSON values."""
    launches, compiled = counted.launches, counted.compiled
    return {
        "setting": describe(counted.setting),
        "versions": {name: version(name) for name in ("torch", "triton", "timm")}
        | {"python": platform.python_version()},
        "assumed": costs.assumptions(),
        "total": costs.total(launches).as_json(),
        "parts": _rows(costs.grouped(launches, costs.by_part_and_kind), ("part", "kind")),
        "kernels": _rows(costs.grouped(launches, costs.by_kernel), ("part", "kind", "name", "shapes")),
        "occasional": {name: costs.total(found).as_json() for name, found in counted.occasional.items()},
        "host_copies_GB": round(sum(x.nbytes for x in launches if x.kind == "host") / 1e9, 4),
        "memory": {
            "peak_GB": round(counted.peak / 1e9, 4),
            "between_steps_GB": round(counted.state / 1e9, 4),
            "at_peak": [
                {"made_in": part, "what": what, "count": count, "GB": round(nbytes / 1e9, 4)}
                for part, what, count, nbytes in counted.at_peak
            ],
        },
        "graphs": compiled.graphs,
        "graph_breaks": compiled.breaks,
        "recompilations": dict(compiled.recompilations),
        "fallbacks": dict(_fallbacks(launches)),
        "waits": counted.waits,
        "kernels_on_the_host": dict(compiled.host_kernels),
        "wrong_layouts": compiled.wrong_layouts,
        "builds": [build.as_json() for build in builds],
        "spilling": [build.as_json() for build in spilling(builds)],
    }


def describe(setting: Setting) -> dict[str, Any]:
    """The setting in the words of the command line."""
    return {
        "preset": setting.preset, "batch": setting.batch, "ranks": setting.ranks, "nodes": setting.nodes,
        "small": setting.small, "settings": list(setting.words), "text_fill": FILL, "device": "H200, absent",
    }  # fmt: skip


def title(setting: dict[str, Any]) -> str:
    """One line that says what was counted."""
    ranks = "one GPU" if setting["ranks"] == 1 else f"rank 0 of {setting['ranks']} on {setting['nodes']} nodes"
    small = f", small form ({SMALL_DEPTH} blocks a network)" if setting["small"] else ""
    words = f", {shlex.join(setting['settings'])}" if setting["settings"] else ""
    return f"{setting['preset']}, {setting['batch']} pictures a GPU, {ranks}{small}{words}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The printed report."""
    yield f"{title(found['setting'])}: counted bytes and operations, predicted milliseconds; nothing was measured"
    yield ""
    yield f"{'part':<12}{'kind':<13}{'launches':>9}{'GB':>9}{'TFLOP':>9}{'floor ms':>10}{'expected ms':>13}"
    for row in found["parts"]:
        yield f"{row['part']:<12}{row['kind']:<13}{_numbers(row)}"
    yield f"{'whole step':<25}{_numbers(found['total'])}"
    for name, row in found["occasional"].items():
        yield f"  not in it: {name}: {row['launches']} launches, {row['GB']:.2f} GB, {row['expected_ms']:.2f} ms"
    yield costs.ASSUMED.sentence()
    yield ""
    yield f"The {DEAREST} dearest kernels"
    for row in found["kernels"][:DEAREST]:
        yield f"{_numbers(row)}  {row['part']}: {row['name']} [{row['shapes']}]"
    yield ""
    memory = found["memory"]
    yield f"Memory: {memory['peak_GB']:.2f} GB at the peak, {memory['between_steps_GB']:.2f} GB between steps"
    for row in memory["at_peak"][:12]:
        yield f"{row['GB']:>9.2f} GB  {row['count']:>4} x {row['what']}, made in {row['made_in']}, alive at the peak"
    yield ""
    yield from _compiled(found)


def _compiled(found: dict[str, Any]) -> Iterator[str]:
    parts = Counter(found["graphs"].values())
    yield f"Graphs: {len(found['graphs'])} ({', '.join(f'{part} {n}' for part, n in parts.items())})"
    yield f"Graph breaks: {found['graph_breaks']}"
    yield from _listed("Recompilations", found["recompilations"])
    yield from _listed("Ops that Inductor left to eager kernels", found["fallbacks"])
    yield from _listed("The host waits for the device", found["waits"])
    yield from _listed("Kernels that run on the CPU, by graph", found["kernels_on_the_host"])
    yield f"Layouts other than the code reads: {len(found['wrong_layouts'])}"
    if not found["builds"]:
        return
    failed = [build for build in found["builds"] if build["error"]]
    kernels = {build["kernel"] for build in found["builds"]}
    yield (
        f"Built for sm_90 with Triton {found['versions']['triton']}: {len(kernels)} kernels in {len(found['builds'])} "
        f"configurations, {len(failed)} failed"
    )
    yield from (f"    {build['kernel']}, {build['configuration']}: {build['error']}" for build in failed)
    yield from _listed(
        "Kernels that spill in every configuration",
        {f"{build['kernel']}, {build['configuration']}: bytes": build["stack"] for build in found["spilling"]},
    )


def _listed(name: str, counts: dict[str, int]) -> Iterator[str]:
    yield f"{name}: {sum(counts.values()) if 'spill' not in name else len(counts)}"
    yield from (f"    {count:>4}  {what}" for what, count in counts.items())


def _fallbacks(launches: Iterable[Launch]) -> Counter[str]:
    """Eager ops inside of compiled graphs."""
    return Counter(f"{x.part}: {x.name}" for x in launches if x.graph and x.kind == "eager")


def _rows(groups: dict[tuple[str, ...], costs.Sum], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [dict(zip(names, key, strict=True)) | found.as_json() for key, found in groups.items()]


def _numbers(row: dict[str, Any]) -> str:
    return (
        f"{row['launches']:>9}{row['GB']:>9.2f}{row['TFLOP']:>9.2f}{row['floor_ms']:>10.2f}{row['expected_ms']:>13.2f}"
    )
