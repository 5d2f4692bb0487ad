"""What step times make of the whole recipe: hours and dollars on N nodes of M GPUs, with every assumption printed.

python -m benchmarks.project                                     # from the roofline's floors
python -m benchmarks.project --results benchmarks/results/*.json # from measured steps
python -m benchmarks.project --ms 100 135                        # from these milliseconds of forward and backward
python -m benchmarks.project --check                             # bytes by formula beside those that gloo ranks move
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks import replay, roofline, summary
from benchmarks.collectives import Network, Shape, fsdp_step, gram_flop, muon_owners, muon_step
from benchmarks.roofline import H200_COPY, H200_MATMUL, STAGE_1, STAGE_2, Step, adamw_step, prx_muon_shapes
from prx_model import PRXConfig, PRXTransformer
from train.recipes import prx_512, prx_1024

BUDGET_HOURS, BUDGET_DOLLARS = 24.0, 1500.0
"""What PRX Part 3 took on 32 H200 (RECIPE.md, "The run")."""


@dataclass(frozen=True)
class Speed:
    """What one GPU does, and how that is known."""

    seconds: tuple[float, float]
    """Forward, teachers and backward of both stages' steps, at the recipe's pictures a GPU of 32 ranks."""
    known: str
    newton_schulz: float = H200_MATMUL
    """Operations/s of the form that is used (`collectives.gram_flop`)."""
    newton_schulz_known: str = "H200's measured matrix rate (RECIPE.md), as if nothing were lost"
    copy: float = H200_COPY
    copy_known: str = "H200's measured copy bandwidth (RECIPE.md)"


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here. All of it is printed with every projection."""

    network: Network = field(default_factory=Network)
    overlap: float = 0.9
    """Share of FSDP2's communication that can run beside the computation, if there is enough of it."""
    buckets: int = 3
    """Of Muon's exchange: the first one's way there and the last one's way back hide behind nothing."""
    checkpoint_every: int = 1_000
    host_copy: float = 20e9
    """Bytes/s at which a GPU's part of a checkpoint is staged to the host; writing runs beside training."""
    evaluation_every: int = 2_000
    evaluation_seconds: float = 30.0
    start_seconds: float = 300.0
    """Loading, compiling and warming up, once a stage."""
    dollars: float = 2.0
    """A GPU-hour."""


IDEAL = Assumptions(
    Network(nvlink=float("inf"), infiniband=float("inf"), nvlink_latency=0.0, infiniband_latency=0.0),
    overlap=1.0, host_copy=float("inf"), evaluation_seconds=0.0, start_seconds=0.0,
)  # fmt: skip
"""A network, a disk and an evaluation that take no time: what is left is computation."""


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe: where a step's seconds go, and the hours of all of them."""

    name: str
    steps: int
    parts: dict[str, float]
    """Seconds a step."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return self.steps * self.seconds / 3600


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
    found: dict[int, float] = {}
    speed = replace(floors(), known="measured: " + ", ".join(path.name for path in files))
    for path in files:
        rows, ceilings = summary.from_json(path)
        speed = replace(speed, copy=ceilings.copy_bytes_per_second, copy_known=f"copy bandwidth in {path.name}")
        for row in rows:
            size = re.match(r"(\d+) px x (\d+), text 40%", row.case)
            if row.op == "training step, without optimizer" and row.way == "ours" and row.clock == "wall" and size:
                found[int(size[1])] = row.seconds
            whole = row.op.startswith("Newton-Schulz") and row.case == "all 112 of PRX"
            if whole and row.way == "ours" and row.clock == "device":
                work = sum(gram_flop(shape) for shape in prx_muon_shapes())
                known = f"its 112 matrices in {path.name}"
                speed = replace(speed, newton_schulz=work / row.seconds, newton_schulz_known=known)
    if not {512, 1024} <= found.keys():
        raise ValueError(
            "the result files hold no measured step without optimizer at both 512 and 1024 px (GPU rows only); "
            "run benchmarks/run_h200.sh, or give --ms"
        )
    return replace(speed, seconds=(found[512], found[1024]))


def project(speed: Speed, assumed: Assumptions) -> list[Stage]:
    """Both stages of the recipe."""
    recipes = (prx_512(), prx_1024())
    return [
        Stage(recipe.preset, recipe.train.steps, _parts(seconds, step, recipe.train.batch, speed, assumed))
        for seconds, step, recipe in zip(speed.seconds, (STAGE_1, STAGE_2), recipes, strict=True)
    ]


def _parts(seconds: float, step: Step, batch: int, speed: Speed, assumed: Assumptions) -> dict[str, float]:
    """Seconds of a step on this network."""
    network = assumed.network
    compute = seconds * (batch / network.ranks) / step.batch
    blocks, root = _groups(step.config)
    volumes = fsdp_step(blocks, root, network.ranks)
    whole = network.ranks / max(network.ranks - 1, 1)
    exchange = network.all_gather((volumes.all_gather + volumes.reduce_scatter) * whole)
    # Every group's collectives have their latency: blocks are gathered twice and scattered once.
    exchange += (3 * len(blocks) + 1) * network.all_gather(0.0)
    hidden = min(assumed.overlap * exchange, compute)
    there_and_back, owner = muon_seconds(step, speed, network)
    return {
        "forward, teachers, backward": compute,
        "FSDP2, not hidden": exchange - hidden,
        "Newton-Schulz, fullest owner": owner,
        "Muon's exchange, not hidden": max(there_and_back - owner, there_and_back / assumed.buckets),
        "optimizer's and EMA's passes": optimizer_bytes(step) / speed.copy / network.ranks,
        "checkpoints": state_bytes(step) / network.ranks / assumed.host_copy / assumed.checkpoint_every,
        "evaluation": assumed.evaluation_seconds / assumed.evaluation_every,
    }


def muon_seconds(step: Step, speed: Speed, network: Network) -> tuple[float, float]:
    """Seconds of Muon's exchange, there and back, of the rank that receives most; and of the fullest owner's work."""
    shapes = prx_muon_shapes(step.config)
    owners, ranks = muon_owners(shapes, network.ranks), network.ranks
    work = [0.0] * ranks
    for shape, owner in zip(shapes, owners, strict=True):
        work[owner] += gram_flop(shape)
    received = max(muon_step(shapes, ranks, rank).all_to_all for rank in range(ranks))
    return 2 * network.all_to_all(received / 2), max(work) / speed.newton_schulz


def optimizer_bytes(step: Step) -> float:
    """Least bytes of a step's elementwise passes over all weights, whatever the number of ranks; EMA every tenth."""
    muon, others = _numbers(step)
    return roofline.muon_step(prx_muon_shapes(step.config)).nbytes + adamw_step(others).nbytes + 1.2 * (muon + others)


def state_bytes(step: Step) -> float:
    """A checkpoint in float32: weights, averages, Muon's momentum, AdamW's two moments."""
    muon, others = _numbers(step)
    return 4.0 * (3 * muon + 4 * others)


@cache
def _groups(config: PRXConfig) -> tuple[list[list[Shape]], list[Shape]]:
    """FSDP2's groups: shapes of the parameters of every block, and of all others."""
    with torch.device("meta"):
        return replay.groups(PRXTransformer(config))


def _numbers(step: Step) -> tuple[int, int]:
    """Numbers that Muon updates, and all others of the denoiser."""
    blocks, root = _groups(step.config)
    total = sum(math.prod(shape) for shapes in (*blocks, root) for shape in shapes)
    muon = sum(rows * columns for rows, columns in prx_muon_shapes(step.config))
    return muon, total - muon


def lines(speed: Speed, assumed: Assumptions) -> list[str]:
    """The projection and all that it rests on."""
    network, stages = assumed.network, project(speed, assumed)
    hours = sum(stage.hours for stage in stages) + len(stages) * assumed.start_seconds / 3600
    dollars = hours * network.ranks * assumed.dollars
    out = [f"PRX Part 3's recipe on {network.nodes} x {network.gpus} GPUs, step times from {speed.known}", ""]
    out.append(f"{'milliseconds a step':<34}" + "".join(f"{stage.name:>12}" for stage in stages))
    for part in stages[0].parts:
        out.append(f"{part:<34}" + "".join(f"{stage.parts[part] * 1e3:>12.2f}" for stage in stages))
    out.append(f"{'sum':<34}" + "".join(f"{stage.seconds * 1e3:>12.2f}" for stage in stages))
    out.append(f"{'steps':<34}" + "".join(f"{stage.steps:>12,}" for stage in stages))
    out.append(f"{'hours':<34}" + "".join(f"{stage.hours:>12.2f}" for stage in stages))
    out += ["", f"in all {hours:.2f} h and ${dollars:,.0f}: {BUDGET_HOURS / hours:.1f} times less than the 24 h, "]
    out[-1] += f"{BUDGET_DOLLARS / dollars:.1f} times less than the $1,500, of the published run on 32 H200"
    return [*out, "", "assumed:", *(f"- {line}" for line in assumptions(speed, assumed))]


def assumptions(speed: Speed, assumed: Assumptions) -> list[str]:
    """Every assumption, as a sentence."""
    n = assumed.network
    return [
        f"forward, teachers and backward at 32 and 16 pictures a GPU take {speed.seconds[0] * 1e3:.1f} and "
        f"{speed.seconds[1] * 1e3:.1f} ms ({speed.known}); other numbers of GPUs share the recipe's batch, at the "
        "same time a picture",
        f"Newton-Schulz runs at {speed.newton_schulz / 1e12:.0f} TFLOP/s ({speed.newton_schulz_known}); the rank that "
        "owns most is waited for",
        f"passes over sharded weights, gradients and averages move their least bytes at {speed.copy / 1e12:.2f} TB/s "
        f"({speed.copy_known})",
        f"a GPU receives {n.nvlink / 1e9:.0f} GB/s from its node and {n.infiniband / 1e9:.0f} GB/s from others, with "
        f"{n.nvlink_latency * 1e6:.0f} and {n.infiniband_latency * 1e6:.0f} us a hop; collectives over nodes go along "
        "rails, then within nodes, each stage a ring",
        "FSDP2 over all ranks: bf16 weights gathered twice a step, root once; float32 gradients scattered once; "
        f"{assumed.overlap:.0%} of that can hide behind computation",
        f"Muon's exchange travels in {assumed.buckets} buckets beside Newton-Schulz",
        f"a checkpoint every {assumed.checkpoint_every:,} steps stops training while it is staged at "
        f"{assumed.host_copy / 1e9:.0f} GB/s a GPU, and is written beside it",
        f"an evaluation every {assumed.evaluation_every:,} steps stops training for {assumed.evaluation_seconds:g} s",
        f"each stage starts in {assumed.start_seconds:g} s; nothing fails, and no step waits for data",
        "captions are embedded beforehand; the cost of that is not counted",
        f"${assumed.dollars:g} a GPU-hour",
    ]


def check(counts: Sequence[int] = (2, 4)) -> list[str]:
    """Bytes by formula and as counted on gloo ranks, a line each.

    Raises:
        SystemExit: they differ.
    """
    out, wrong = [], False
    for ranks in counts:
        for kind, rank, formula, counted in replay.check(ranks):
            wrong |= formula != counted
            verdict = "equal" if formula == counted else "DIFFERENT"
            out.append(f"{ranks} ranks, rank {rank}, {kind:<15}{formula:>12,.0f}{counted:>12,.0f}  {verdict}")
    if wrong:
        raise SystemExit("\n".join([*out, "the formulas are not what torch.distributed moves"]))
    return [f"{'bytes that a rank receives in a step':<33}{'formula':>12}{'moved':>12}", *out]


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
        speed = measured(asked.results) if asked.results else floors()
    except ValueError as error:
        parser.error(str(error))
    if asked.ms:
        speed = replace(speed, seconds=(asked.ms[0] / 1e3, asked.ms[1] / 1e3), known="the command line")
    print(*lines(speed, assumed), sep="\n")


if __name__ == "__main__":
    main()
