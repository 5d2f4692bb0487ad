"""Profile a training step: the most expensive kernels, and the shares of matrix work, memory work and gaps.

python -m benchmarks.profile_step --out DIR [--size 512] [--way ours]

Writes DIR/profile-<size>.json (kernels, kinds, milliseconds a step, peak memory) and prints the table. The step is
that of test_step.py, with all ingredients; `--way` takes any of its names. Without a GPU the sizes are tiny, which
shows that everything works; such figures mean nothing.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.clock import wall_timing
from benchmarks.measure import CPU_NOTE
from benchmarks.peers import PEERS
from benchmarks.sizes import GPU, Case, cases
from benchmarks.trainer_step import AnyStep, TrainerStep, make_step
from benchmarks.training_step import LADDER, WHOLE, Way

# In this order: attention kernels have "cutlass" in their names too.
_KINDS = (
    ("attention", ("flash", "attention", "fmha", "attn", "sdpa")),
    (
        "matrix",
        (
            *("gemm", "cutlass", "nvjet", "wgmma", "xmma", "ampere_", "addmm", "::mm", "bmm", "matmul", "triton_tem"),
            *("convolution", "implicit", "project_kernel", "_gradient_kernel"),
        ),
    ),
    ("copies and memory sets", ("memcpy", "memset")),
)
_FUSED = ("triton_poi_", "triton_red_", "triton_per_")
"""Inductor's kernels without a product, which are named after all that went into them."""
EVERY_WAY: dict[str, Way] = {way.name: way for way in (*WHOLE, *LADDER[:-1])}
TOP = 20
"""Kernels that are printed."""


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    if name.startswith(_FUSED):
        return "other memory-bound"
    return next((kind for kind, words in _KINDS if any(word in name for word in words)), "other memory-bound")


def summarise(events: Any, on_gpu: bool, steps: int) -> dict[str, Any]:
    """Time by kernel and by kind, in microseconds a step, from a profiler's averages."""
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if getattr(event, "is_user_annotation", False):  # a named span holds kernels that are counted already
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent and (not on_gpu or str(event.device_type).endswith("CUDA")):
            by_kernel[event.key][0] += spent / steps
            by_kernel[event.key][1] += event.count / steps
    by_kind: dict[str, float] = defaultdict(float)
    for name, (spent, _) in by_kernel.items():
        by_kind[kind_of(name)] += spent
    ranked = sorted(by_kernel.items(), key=lambda item: -item[1][0])
    kernels = [{"kernel": name, "us": spent, "launches": count} for name, (spent, count) in ranked]
    return {"kernels": kernels, "kinds_us": dict(by_kind), "busy_us": sum(by_kind.values())}


def measure(step: AnyStep, steps: int) -> dict[str, Any]:
    """Run, time and profile the step: milliseconds a step, and where they go by kernel and by kind.

    "gap_ms" is what of a step's median time no kernel runs in; None on a CPU.
    """
    for _ in range(3):
        step()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    synchronize = torch.cuda.synchronize if GPU else lambda: None
    timing = wall_timing(step, [()], synchronize, min_seconds=0.0)
    seconds = sorted(timing.seconds() for _ in range(steps))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        synchronize()
    result = summarise(recorded.key_averages(), GPU, steps)
    result |= {"ms": seconds[steps // 2] * 1e3, "ms_min": seconds[0] * 1e3, "ms_max": seconds[-1] * 1e3}
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if GPU else None
    result["gap_ms"] = max(result["ms"] - result["busy_us"] / 1e3, 0.0) if GPU else None
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The table of a result: shares of the step by kind and of its gaps, then the most expensive kernels."""
    milliseconds = result["ms"]
    note = "" if result["gap_ms"] is not None else f" ({CPU_NOTE})"
    out = [f"{result['way']}, {result['case']}: {milliseconds:.2f} ms{note}"]
    shares = {kind: spent / 1e3 for kind, spent in result["kinds_us"].items()}
    if result["gap_ms"] is not None:
        shares["gaps: no kernel runs"] = result["gap_ms"]
    for kind, spent in sorted(shares.items(), key=lambda item: -item[1]):
        out.append(f"  {kind:<24}{spent:9.3f} ms {spent / milliseconds:7.1%}")
    for row in result["kernels"][:TOP]:
        out.append(f"  {row['us'] / 1e3:9.3f} ms {row['launches']:7.1f}x  {row['kernel'][:90]}")
    return out


def chosen(size: int | None) -> Case:
    """The recipe's stage with pictures of this size, captions as full as they are likely to be."""
    found = cases()
    return next((case for case in found if case.size == size), found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, choices=[512, 1024], default=512)
    parser.add_argument("--way", choices=EVERY_WAY, default="ours")
    parser.add_argument("--steps", type=int, default=10, help="10 hold one average of the weights")
    asked = parser.parse_args()
    missing = PEERS["lpips"].missing() if EVERY_WAY[asked.way].teachers else None
    if missing:
        parser.error(f"{missing}, which the teachers of way {asked.way!r} need")
    asked.out.mkdir(parents=True, exist_ok=True)
    case = chosen(asked.size)
    step = make_step(EVERY_WAY[asked.way], case)
    result = measure(step, asked.steps)
    if isinstance(step, TrainerStep):
        step.close()
    sizes = {name: value for name, value in asdict(case).items() if name != "config"}
    result |= {"way": asked.way, "case": str(case), "sizes": sizes, "machine": machine.describe()}
    (asked.out / f"profile-{asked.size}.json").write_text(json.dumps(result, indent=1))
    print(*lines(result), sep="\n")


if __name__ == "__main__":
    main()
