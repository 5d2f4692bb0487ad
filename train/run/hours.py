"""How long a stage takes and what it costs: the one answer that --dry-run, doctor.py and benchmarks.project print.

It stands on a measured step where one is given, else on the counted step of the preset (benchmarks/budgets/), else on
an assumed MFU, named as such. Collectives, checkpoints, evaluations and start-up are by formula (`Assumptions`).
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prx_kernels.muon.owners import Layout
from prx_model import PRXConfig, PRXTransformer
from train.commandline import DryRun
from train.ranks.parallel import mesh_shape
from train.recipes import PRESETS, Parallel, Recipe
from train.run.collectives import (
    Network,
    Shape,
    fsdp_step,
    gathers,
    gram_flop,
    groups,
    muon_exchange,
    muon_step,
)

BUDGETS = Path(__file__).resolve().parents[2] / "benchmarks" / "budgets"
PUBLISHED_HOURS, PUBLISHED_GPUS = 24.0, 32
"""What PRX Part 3 took (docs/recipe.md, "The run")."""
COUNTED_TFLOPS = 989.0
"""Data-sheet rate of the GPU that steps are counted for, an H200; another rate is another GPU."""
COPY = 4.3e12
"""Bytes/s read plus written that an H200 reaches (docs/recipe.md, "Where its time goes")."""


@dataclass(frozen=True)
class Assumptions:
    """What is not measured here. All of it is printed with every projection."""

    network: Network = field(default_factory=Network)
    overlap: float = 0.9
    """Share of FSDP2's communication that can run beside the computation, if there is enough of it."""
    checkpoint_every: int = 1_000
    host_copy: float = 20e9
    """Bytes/s at which a GPU's part of a checkpoint is staged to the host; writing runs beside training."""
    evaluation_every: int = 2_000
    evaluation_seconds: float = 30.0
    start_seconds: float = 300.0
    """Loading, compiling and warming up, once a stage."""
    dollars: float = 2.0
    """A GPU-hour."""


@dataclass(frozen=True)
class OneStep:
    """What a step takes on one GPU without collectives, and how that is known."""

    parts: dict[str, float]
    """Seconds; the first is what collectives of FSDP2 can hide behind."""
    known: str
    orthogonalising: float = 0.0
    """Seconds of Newton-Schulz at the fullest owner, behind which Muon's exchange can hide."""
    copy: float = COPY
    """Bytes/s at which averages are moved."""


@dataclass(frozen=True)
class Expected:
    """How long a stage takes, and what that stands on."""

    preset: str
    steps: int
    network: Network
    parts: dict[str, float]
    """Seconds a step."""
    start_seconds: float
    price: float
    """Dollars a GPU-hour."""
    stands_on: str

    @property
    def seconds(self) -> float:
        """Of a step, its share of checkpoints and evaluations with it."""
        return sum(self.parts.values())

    @property
    def hours(self) -> float:
        return (self.steps * self.seconds + self.start_seconds) / 3600

    @property
    def dollars(self) -> float:
        return self.hours * self.network.ranks * self.price

    def line(self) -> str:
        """The one printed line."""
        n = self.network
        shown = f"{self.seconds * 1e3:.1f}" if self.seconds >= 1e-3 else f"{self.seconds * 1e3:.2g}"
        tiny = "; a step this short is bound by its launches, and takes milliseconds" if self.seconds < 5e-3 else ""
        gpus = f"{n.ranks} GPUs ({n.nodes} x {n.gpus})" if n.ranks > 1 else "1 GPU"
        return (
            f"{self.steps:,} steps on {gpus}: {shown} ms a step, {self.hours:.2f} h, "
            f"${self.dollars:,.0f} at ${self.price:g} a GPU-hour{tiny}; stands on {self.stands_on}"
        )


def network_of(gpus: int) -> Network:
    """Nodes of eight, or of the largest number below that divides the GPUs."""
    node = max(size for size in range(1, 9) if gpus % size == 0)
    return Network(gpus // node, node)


def expected(
    recipe: Recipe, work: float, assumed: DryRun, *, model: Assumptions | None = None, step: OneStep | None = None
) -> Expected:
    """What a stage takes on the assumed GPUs.

    Args:
        recipe: of one stage.
        work: operations of the denoiser, a step of all GPUs forward and backward.
        assumed: GPUs, price, and the MFU where nothing else is known.
        model: the network and what stops training; nodes of eight unless given.
        step: a measured one; the counted one unless given.

    Raises:
        UserError: a mesh that does not fit the GPUs.
    """
    model = model or Assumptions(network=network_of(assumed.gpus), dollars=assumed.dollars_per_hour)
    step = step or counted_step(recipe, assumed)
    if step is None:
        rate = model.network.ranks * assumed.peak_tflops * 1e12
        published = published_mfu()
        mfu = 0.25 if assumed.mfu is None else assumed.mfu
        stands_on = (
            f"an assumed MFU of {mfu:.0%} (the denoiser's, of {assumed.peak_tflops:g} TFLOP/s a GPU, with everything "
            f"that a run does); by the same formula the published run's was {published:.1%}, which would make "
            f"{recipe.train.steps * work / (rate * published) / 3600:.2f} h"
        )
        parts = {"everything, at the assumed MFU": work / (rate * mfu)}
        return Expected(recipe.preset, recipe.train.steps, model.network, parts, 0.0, model.dollars, stands_on)
    around = around_step(recipe, step, model)
    stands_on = (
        f"{step.known}; {sum(around.values()) * 1e3:.1f} ms of it are collectives, averages, checkpoints and "
        f"evaluations by formula; {model.start_seconds:g} s of start-up are in the hours"
    )
    if recipe.text.kind == "t5gemma" and not recipe.text.cache:
        stands_on += "; captions are taken from a text cache (--text.cache)"
    return Expected(
        recipe.preset, recipe.train.steps, model.network, step.parts | around, model.start_seconds, model.dollars,
        stands_on,
    )  # fmt: skip


def around_step(recipe: Recipe, step: OneStep, model: Assumptions) -> dict[str, float]:
    """Seconds a step of what is not computed in it: exposed collectives, averages, checkpoints, evaluations."""
    network, compute = model.network, next(iter(step.parts.values()))
    layout = rank_layout(recipe.parallel, network)
    try:
        network.groups(layout)
    except ValueError:  # shards that cut across nodes: the slower link for all of it
        network = replace(network, nodes=network.ranks, gpus=1)
    exchange = fsdp_seconds(recipe.model, layout, recipe.parallel, network)
    parts = {"FSDP2, not hidden": exchange - min(model.overlap * exchange, compute)}
    if recipe.muon.enabled:
        muon, buckets = muon_seconds(recipe.model, layout, network)
        parts["Muon's exchange, not hidden"] = max(muon - step.orthogonalising, muon / buckets)
    everything = sum(numbers(recipe.model))
    return parts | {
        "averages": 12.0 * everything / layout.shards / step.copy / recipe.ema.every,
        "checkpoints": state_bytes(recipe.model) / layout.shards / model.host_copy / model.checkpoint_every,
        "evaluation": model.evaluation_seconds / model.evaluation_every,
    }


def published_mfu() -> float:
    """The denoiser's operations of both stages over 24 h of 32 H200: 4.2 %."""
    from prx_model.flops import training_flop

    work = 0.0
    for name in ("prx-512", "prx-1024"):
        recipe = PRESETS[name]()
        assert isinstance(recipe, Recipe)
        tokens = recipe.model.tokens(recipe.data.height, recipe.data.width)
        a_picture = training_flop(recipe.model, tokens, recipe.text.max_tokens, recipe.routing)
        work += recipe.train.steps * recipe.train.batch * a_picture
    return work / (PUBLISHED_HOURS * 3600 * PUBLISHED_GPUS * COUNTED_TFLOPS * 1e12)


# --- the counted step ------------------------------------------------------------------------------------------------


def budget(preset: str, ranks: int) -> dict[str, float]:
    """Figures of a preset's counted step by their names; "pictures" a GPU too. Empty where it was not counted."""
    path = BUDGETS / f"{preset}.{ranks}-rank{'s' if ranks > 1 else ''}.txt"
    if not path.is_file():
        return {}
    text = path.read_text()
    found = {name: float(value) for value, name in re.findall(r"^ *([\d.e+-]+)  (\S.*)$", text, re.MULTILINE)}
    pictures = re.match(r"# .*?, (\d+) pictures a GPU", text)
    return found | {"pictures": float(pictures[1])} if pictures and "expected ms" in found else {}


def counted_step(recipe: Recipe, assumed: DryRun) -> OneStep | None:
    """The counted step of the preset; None where the recipe's step is another, or an MFU was asked for.

    Two counts, of one GPU and of a rank of 32, tell the time a picture from the optimizer, which is shared out.
    """
    one, rank = budget(recipe.preset, 1), budget(recipe.preset, 32)
    other = assumed.mfu is not None or assumed.peak_tflops != COUNTED_TFLOPS or assumed.gpus > recipe.train.batch
    if not rank or not one or other or not same_step(recipe):
        return None
    pictures = recipe.train.batch / assumed.gpus
    exact = {1: one, 32: rank}.get(assumed.gpus, {})
    if exact.get("pictures") == pictures:
        ms = exact["expected ms"]
        how = f"at {pictures:g} pictures a GPU, the optimizer in it"
    else:
        optimizer = (one["expected ms"] - rank["expected ms"]) * 32 / 31
        ms = (one["expected ms"] - optimizer) * pictures / one["pictures"] + optimizer / assumed.gpus
        how = f"scaled to {pictures:g} pictures a GPU at the same time a picture, the optimizer shared by the GPUs"
    known = f"the counted step of {recipe.preset} on H200 ({ms:.1f} ms {how}; predicted, not measured)"
    return OneStep({"the counted step, optimizer in it": ms / 1e3}, known)


_FREE = {
    "data": {"height", "width"},
    "text": {"kind", "max_tokens"},
    "train": {"attention", "deterministic"},
    "parallel": {"micro_batches", "checkpointing"},
    "muon": {"enabled", "nesterov", "ns_steps", "ns_coefficients", "ns_preconditioner"},
}
"""Of these sections only these fields change a step; of the losses all but weights and where they lie."""


def same_step(recipe: Recipe) -> bool:
    """Whether a recipe's step does what its preset's does, so that the count holds for it."""
    usual = PRESETS[recipe.preset]()
    if not isinstance(usual, Recipe):
        return False

    def what(made: Recipe) -> dict[str, Any]:
        told: dict[str, Any] = {name: getattr(made, name) for name in ("model", "routing")}
        for name, names in _FREE.items():
            told |= {f"{name}.{field}": getattr(getattr(made, name), field) for field in names}
        for name in ("repa", "lpips", "pdino"):
            section = getattr(made, name)
            told |= {
                f"{name}.{f.name}": getattr(section, f.name)
                for f in fields(section)
                if f.name not in ("weight", "weights")
            }
        return told

    on_gpu = recipe.train.precision != "fp32" and recipe.train.device != "cpu" and recipe.compile.enabled != "no"
    return on_gpu and what(recipe) == what(usual)


# --- collectives and states ------------------------------------------------------------------------------------------


def muon_shapes(config: PRXConfig) -> list[tuple[int, int]]:
    """The 2-D weights inside of blocks, which Muon updates."""
    blocks, _ = _groups(config)
    return [(shape[0], shape[1]) for shapes in blocks for shape in shapes if len(shape) == 2]


def rank_layout(settings: Parallel, network: Network, rank: int = 0) -> Layout:
    """Where a rank stands in the mesh that train/ranks/parallel.py makes of these settings on this network."""
    replicas, shards = mesh_shape(settings, network.ranks, network.gpus)
    return Layout(shards=shards, shard=rank % shards, replicas=replicas, replica=rank // shards)


def fsdp_seconds(config: PRXConfig, layout: Layout, settings: Parallel, network: Network) -> float:
    """Seconds of FSDP2's collectives one after the other; every group of parameters has its own."""
    blocks, root = _groups(config)
    units, reshard = [*blocks, root], settings.reshard_after_forward
    volumes = fsdp_step(units, layout, reshard=reshard)
    shards, replicas = network.groups(layout)
    calls = len(units) * (gathers(reshard=reshard) + 1)
    within = shards.ring(volumes.all_gather + volumes.reduce_scatter, calls)
    return within + replicas.ring(volumes.replica_all_reduce, 2 * len(units))


def muon_seconds(config: PRXConfig, layout: Layout, network: Network) -> tuple[float, int]:
    """Seconds of Muon's exchange, there, back and to the replicas, of the rank that waits longest; and its buckets.

    The first bucket's way there and the last one's way back hide behind nothing.
    """
    shapes = muon_shapes(config)
    buckets = len(muon_exchange(shapes, layout).buckets)
    shards, replicas = network.groups(layout)
    longest = 0.0
    for rank in range(layout.ranks):
        here = replace(layout, shard=rank % layout.shards, replica=rank // layout.shards)
        volumes = muon_step(shapes, here)
        seconds = shards.all_to_all(volumes.all_to_all, 2 * buckets) + replicas.ring(
            volumes.replica_all_gather, buckets
        )
        longest = max(longest, seconds)
    return longest, buckets


def fullest_owner(config: PRXConfig, layout: Layout) -> tuple[int, float]:
    """Matrices that the owner with most work holds, and its operations."""
    shapes = muon_shapes(config)
    held: list[list[float]] = [[] for _ in range(layout.ranks)]
    for shape, owner in zip(shapes, muon_exchange(shapes, layout).owners, strict=True):
        held[owner].append(gram_flop(shape))
    fullest = max(held, key=sum)
    return len(fullest), sum(fullest)


def state_bytes(config: PRXConfig) -> float:
    """A checkpoint in float32: weights, averages, Muon's momentum, AdamW's two moments."""
    muon, others = numbers(config)
    return 4.0 * (3 * muon + 4 * others)


@cache
def _groups(config: PRXConfig) -> tuple[list[list[Shape]], list[Shape]]:
    """FSDP2's groups: shapes of the parameters of every block, and of all others."""
    with torch.device("meta"):
        return groups(PRXTransformer(config))


def numbers(config: PRXConfig) -> tuple[int, int]:
    """Numbers that Muon updates, and all others of the denoiser."""
    blocks, root = _groups(config)
    total = sum(math.prod(shape) for shapes in (*blocks, root) for shape in shapes)
    muon = sum(rows * columns for rows, columns in muon_shapes(config))
    return muon, total - muon
