"""What step times make of the whole recipe: hours and dollars on N nodes of M GPUs, with every assumption printed.

Weights lie on the GPUs as train/ranks/parallel.py lays out the presets. The roofline's floors are printed first.
The number is that of train/run/hours.py, as --dry-run and doctor.py print it.

python -m benchmarks.project                                     # from the counted steps
python -m benchmarks.project --results benchmarks/results/*.json # from measured steps
python -m benchmarks.project --ms 100 135                        # from these milliseconds of forward and backward
python -m benchmarks.project --check                             # bytes by formula beside those that gloo ranks move
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import replay, roofline, summary
from benchmarks.measure import Row
from benchmarks.roofline import (
    H200_COPY,
    H200_MATMUL,
    STAGE_1,
    STAGE_2,
    Step,
    adamw_step,
    owner_sample,
    prx_muon_shapes,
)
from prx_kernels.muon.owners import Layout
from train.commandline import DryRun
from train.recipes import Recipe, prx_512, prx_1024
from train.run.collectives import Network, gram_flop, muon_exchange
from train.run.hours import Assumptions, Expected, OneStep, expected, fullest_owner, numbers, rank_layout

BUDGET_HOURS, BUDGET_DOLLARS = 24.0, 1500.0
"""What PRX Part 3 took on 32 H200 (docs/recipe.md, "The run")."""


@dataclass(frozen=True)
class Rate:
    """How fast Newton-Schulz runs, and how that is known."""

    flop_per_second: float
    """Operations/s of the form that is used (`collectives.gram_flop`)."""
    known: str


WHOLE_MODEL = len(prx_muon_shapes())
"""Matrices that Muon updates: 112."""
IDEAL_RATE = Rate(H200_MATMUL, "H200's measured matrix rate (docs/recipe.md), as if nothing were lost")


@dataclass(frozen=True)
class Speed:
    """What one GPU does, and how that is known."""

    seconds: tuple[float, float]
    """Forward, teachers and backward of both stages' steps, at the recipe's pictures a GPU of 32 ranks."""
    known: str
    newton_schulz: Mapping[int, Rate] = field(default_factory=lambda: {WHOLE_MODEL: IDEAL_RATE})
    """By the number of matrices that are orthogonalised together."""
    copy: float = H200_COPY
    copy_known: str = "H200's measured copy bandwidth (docs/recipe.md)"

    def orthogonalising(self, matrices: int) -> Rate:
        """The rate that is known of the nearest number of matrices, the smaller of two as near."""
        return self.newton_schulz[min(self.newton_schulz, key=lambda count: (abs(count - matrices), count))]


IDEAL = Assumptions(
    Network(nvlink=float("inf"), infiniband=float("inf"), nvlink_latency=0.0, infiniband_latency=0.0),
    overlap=1.0, host_copy=float("inf"), evaluation_seconds=0.0, start_seconds=0.0,
)  # fmt: skip
"""A network, a disk and an evaluation that take no time: what is left is computation."""


def floors() -> Speed:
    """The roofline's: all operations but Newton-Schulz's at the ceiling, which stands for itself."""
    stages = [step.parts() for step in (STAGE_1, STAGE_2)]
    parts = ("denoiser, TREAD", "LPIPS", "P-DINO", "REPA teacher")
    first, second = (sum(stage[part] for part in parts) / H200_MATMUL for stage in stages)
    return Speed((first, second), "the roofline's floors: no step has been timed")


def measured(files: Sequence[Path]) -> Speed:
    """From result files: the step without its optimizer, ours, captions as full as they are likely to be.

    Raises:
        ValueError: a file that is none of ours, or none that holds both stages.
    """
    batches = {step.size: step.batch for step in (STAGE_1, STAGE_2)}
    found: dict[int, float] = {}
    rates: dict[int, Rate] = {}
    speed = replace(floors(), known="measured: " + ", ".join(path.name for path in files))
    for path in files:
        rows, ceilings = summary.from_json(path)
        speed = replace(speed, copy=ceilings.copy_bytes_per_second, copy_known=f"copy bandwidth in {path.name}")
        for row in rows:
            size = re.match(r"(\d+) px x (\d+), text 40%", row.case)
            timed = row.op == "training step, without optimizer" and row.way == "ours" and row.clock == "wall"
            # Half of the pictures, a smaller GPU's part, would be taken for all of them.
            if timed and size and int(size[2]) == batches.get(int(size[1])):
                found[int(size[1])] = row.seconds
            count = _matrices(row)
            if count:
                work = sum(gram_flop(shape) for shape in owner_sample(prx_muon_shapes(), count))
                rates[count] = Rate(work / row.seconds, f"measured of {row.case} in {path.name}")
    if not {512, 1024} <= found.keys():
        raise ValueError(
            "the result files hold no measured step without optimizer at both 512 and 1024 px with the recipe's "
            f"{STAGE_1.batch} and {STAGE_2.batch} pictures (GPU rows only); run benchmarks/run_h200.sh on an H200, or "
            "give --ms"
        )
    return replace(speed, seconds=(found[512], found[1024]), newton_schulz=rates or speed.newton_schulz)


def _matrices(row: Row) -> int:
    """How many of PRX's matrices our Newton-Schulz orthogonalised on a GPU in this row; 0 where it is another row."""
    if not row.op.startswith("Newton-Schulz") or row.way != "ours" or row.clock != "device":
        return 0
    owned = re.fullmatch(r"an owner's (\d+)|all (\d+) of PRX", row.case)
    return int(owned[1] or owned[2]) if owned else 0


def project(speed: Speed | None, assumed: Assumptions) -> list[Expected]:
    """Both stages of the recipe, with the counted steps where no speed is given: `train.run.hours.expected`."""
    made = []
    for number, (recipe, step) in enumerate(zip((prx_512(), prx_1024()), (STAGE_1, STAGE_2), strict=True)):
        asked = DryRun(gpus=assumed.network.ranks, dollars_per_hour=assumed.dollars)
        timed = None if speed is None else one_step(speed.seconds[number], step, recipe, speed, assumed)
        work = step.parts()["denoiser, TREAD"] * step.gpus
        made.append(expected(recipe, work, asked, model=assumed, step=timed))
    return made


def one_step(seconds: float, step: Step, recipe: Recipe, speed: Speed, assumed: Assumptions) -> OneStep:
    """A step without collectives, from the time of forward, teachers and backward."""
    network = assumed.network
    layout = rank_layout(recipe.parallel, network)
    compute = seconds * (recipe.train.batch / network.ranks) / step.batch
    count, work = fullest_owner(step.config, layout)
    owner = work / speed.orthogonalising(count).flop_per_second
    parts = {
        "forward, teachers, backward": compute,
        "Newton-Schulz, fullest owner": owner,
        "clipping, optimizer: passes": pass_bytes(step) / layout.shards / speed.copy,
    }
    return OneStep(parts, f"step times from {speed.known}", owner, speed.copy)


def pass_bytes(step: Step) -> float:
    """Least bytes of a step's elementwise passes over all shards of one copy, without averages.

    Clipping reads the gradients for their norm, then reads and writes them to scale them.
    """
    muon, others = numbers(step.config)
    optimizer = roofline.muon_step(prx_muon_shapes(step.config)).nbytes + adamw_step(others).nbytes
    return optimizer + 12.0 * (muon + others)


def lines(speed: Speed | None, assumed: Assumptions) -> list[str]:
    """The line of each stage, where its step's seconds go, and all that it rests on."""
    network, stages = assumed.network, project(speed, assumed)
    hours, dollars = (sum(values) for values in zip(*((stage.hours, stage.dollars) for stage in stages), strict=True))
    out = [f"PRX Part 3's recipe on {network.nodes} x {network.gpus} GPUs"]
    out += [*(f"{stage.preset}: {stage.line()}" for stage in stages), ""]
    out.append(f"{'milliseconds a step':<34}" + "".join(f"{stage.preset:>12}" for stage in stages))
    for part in stages[0].parts:
        out.append(f"{part:<34}" + "".join(f"{stage.parts[part] * 1e3:>12.2f}" for stage in stages))
    out.append(f"{'sum':<34}" + "".join(f"{stage.seconds * 1e3:>12.2f}" for stage in stages))
    out.append(f"{'steps':<34}" + "".join(f"{stage.steps:>12,}" for stage in stages))
    out.append(f"{'hours':<34}" + "".join(f"{stage.hours:>12.2f}" for stage in stages))
    out += ["", f"in all {hours:.2f} h and ${dollars:,.0f}: {BUDGET_HOURS / hours:.1f} times less than the 24 h, "]
    out[-1] += f"{BUDGET_DOLLARS / dollars:.1f} times less than the $1,500, of the published run on 32 H200"
    return [*out, "", "assumed:", *(f"- {line}" for line in assumptions(speed, assumed))]


def assumptions(speed: Speed | None, assumed: Assumptions) -> list[str]:
    """Every assumption, as a sentence."""
    n, settings = assumed.network, prx_512().parallel
    layout = rank_layout(settings, n)
    count, _ = fullest_owner(STAGE_1.config, layout)
    buckets = len(muon_exchange(prx_muon_shapes(), layout).buckets)
    again = "and again for backward" if settings.reshard_after_forward else "and kept until backward"
    own = [] if speed is None else _of_speed(speed, count)
    return [
        *own,
        f"{described(layout)}, as train/ranks/parallel.py lays the presets out on {n.nodes} x {n.gpus} GPUs; the "
        "denoiser's alone: REPA's projector, 0.3% of it, is left out",
        f"bf16 weights are gathered among the shards once for forward {again}; float32 gradients are reduce-scattered "
        "among the shards and all-reduced over replicas, if there are any; one collective after the other, "
        f"{assumed.overlap:.0%} of it can hide behind computation",
        "Muon's matrices have their owners among all GPUs: bf16 rows go to owners in their own replica, updates come "
        f"back and are gathered over replicas, if there are any, in {buckets} buckets beside Newton-Schulz",
        f"a GPU receives {n.nvlink / 1e9:.0f} GB/s from its node and {n.infiniband / 1e9:.0f} GB/s from others, with "
        f"{n.nvlink_latency * 1e6:.0f} and {n.infiniband_latency * 1e6:.0f} us a hop; within a node and along a rail "
        "a collective is a ring",
        f"a checkpoint every {assumed.checkpoint_every:,} steps stops training while every GPU stages its shard at "
        f"{assumed.host_copy / 1e9:.0f} GB/s; one copy is written beside training",
        f"an evaluation every {assumed.evaluation_every:,} steps stops training for {assumed.evaluation_seconds:g} s",
        f"each stage starts in {assumed.start_seconds:g} s; nothing fails, and no step waits for data",
        "captions are embedded beforehand; the cost of that is not counted",
        f"${assumed.dollars:g} a GPU-hour",
    ]


def _of_speed(speed: Speed, count: int) -> list[str]:
    """What a step without its optimizer needs besides."""
    rate = speed.orthogonalising(count)
    return [
        f"forward, teachers and backward at 32 and 16 pictures a GPU take {speed.seconds[0] * 1e3:.1f} and "
        f"{speed.seconds[1] * 1e3:.1f} ms ({speed.known}); other numbers of GPUs share the recipe's batch, at the "
        "same time a picture",
        f"Newton-Schulz runs at {rate.flop_per_second / 1e12:.0f} TFLOP/s ({rate.known}); the fullest owner, with "
        f"{count} of the matrices, is waited for, and is taken to work on them together",
        "every GPU passes over its shard of gradients, weights, state and averages with the least bytes, at "
        f"{speed.copy / 1e12:.2f} TB/s ({speed.copy_known})",
    ]


def described(layout: Layout) -> str:
    """A layout in the field's words."""
    if layout.ranks == 1:
        return "one GPU: nothing is sharded"
    if layout.replicas == 1:
        return f"FSDP: one copy of the weights in {layout.shards} shards"
    if layout.shards == 1:
        return f"DDP: {layout.replicas} copies of the weights, nothing is sharded"
    return f"HSDP: {layout.replicas} replicas of the weights in {layout.shards} shards each"


def check(cases: Sequence[replay.Case] = replay.CASES) -> list[str]:
    """Bytes by formula and as counted on gloo ranks, a line each.

    Raises:
        SystemExit: they differ.
    """
    out, wrong = [f"{'bytes a rank receives in a step; replicas x shards':<54}{'formula':>10}{'moved':>10}"], False
    for case in cases:
        for kind, rank, formula, counted in replay.check(case):
            wrong |= formula != counted
            verdict = "equal" if formula == counted else "DIFFERENT"
            label = f"{case}, rank {rank}, {kind}"
            out.append(f"{label:<54}{formula:>10,.0f}{counted:>10,.0f}  {verdict}")
    if wrong:
        raise SystemExit("\n".join([*out, "the formulas are not what torch.distributed moves"]))
    return out


def main() -> None:
    default = Assumptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--results", type=Path, nargs="+", help="result files with measured steps")
    source.add_argument("--ms", type=float, nargs=2, metavar=("512", "1024"), help="ms of forward and backward")
    source.add_argument("--check", action="store_true", help="hold the formulas to what gloo ranks move")
    parser.add_argument("--nodes", type=int, default=default.network.nodes)
    parser.add_argument("--gpus", type=int, default=default.network.gpus, help="of a node")
    parser.add_argument("--nvlink", type=float, default=default.network.nvlink / 1e9, help="GB/s a GPU")
    parser.add_argument("--infiniband", type=float, default=default.network.infiniband / 1e9, help="GB/s a GPU")
    parser.add_argument("--overlap", type=float, default=default.overlap, help="share of FSDP2 that can hide")
    parser.add_argument("--evaluation-seconds", type=float, default=default.evaluation_seconds)
    parser.add_argument("--dollars", type=float, default=default.dollars, help="a GPU-hour")
    asked = parser.parse_args()
    if asked.check:
        print(*check(), sep="\n")
        return
    if min(asked.nodes, asked.gpus) < 1 or min(asked.nvlink, asked.infiniband, *(asked.ms or [1])) <= 0:
        parser.error("nodes, GPUs, bandwidths and milliseconds must be positive")
    network = replace(
        default.network,
        nodes=asked.nodes,
        gpus=asked.gpus,
        nvlink=asked.nvlink * 1e9,
        infiniband=asked.infiniband * 1e9,
    )
    assumed = replace(
        default, network=network, overlap=asked.overlap, dollars=asked.dollars,
        evaluation_seconds=asked.evaluation_seconds,
    )  # fmt: skip
    try:
        speed = measured(asked.results) if asked.results else None
    except ValueError as error:
        parser.error(str(error))
    if asked.ms:
        speed = replace(floors(), seconds=(asked.ms[0] / 1e3, asked.ms[1] / 1e3), known="the command line")
    print(
        *roofline.lines(),
        "(floors: nothing can be faster, and nothing will be as fast)",
        "",
        *lines(speed, assumed),
        sep="\n",
    )


if __name__ == "__main__":
    main()
