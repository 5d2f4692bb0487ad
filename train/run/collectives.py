"""Bytes that a step's collectives move by formula, and how long a network takes for them.

Volumes are bytes that one rank receives from the others in a step. `python -m benchmarks.project --check` holds the
formulas to the count of a real step on gloo ranks, under FSDP, HSDP and DDP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from prx_kernels import newton_schulz_flop
from prx_kernels.muon.exchange import Exchange
from prx_kernels.muon.owners import Block, Layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """GPUs on nodes: every GPU reaches those of its node by NVLink and its own rail of the others by InfiniBand.

    A collective over nodes is done in two stages, one after the other: along the rails, and within each node. Each
    stage is a ring: its bytes at the bandwidth, and a latency a hop.
    """

    nodes: int = 4
    gpus: int = 8
    """GPUs a node."""
    nvlink: float = 370e9
    """Bytes/s that a GPU receives from its node, reached, not on the data sheet (450 GB/s each way on an H200)."""
    infiniband: float = 42e9
    """Bytes/s that a GPU receives from other nodes, reached (400 Gb/s a GPU on the data sheet)."""
    nvlink_latency: float = 3e-6
    infiniband_latency: float = 10e-6
    """Seconds a hop."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def groups(self, layout: Layout) -> tuple["Network", "Network"]:
        """The ranks of one shard group, which follow one another, and those that hold the same shard.

        Raises:
            ValueError: shards that fill neither nodes nor even parts of one.
        """
        gpus = min(layout.shards, self.gpus)
        nodes = layout.shards // gpus
        if nodes * gpus != layout.shards or self.gpus % gpus or self.nodes % nodes or layout.ranks != self.ranks:
            raise ValueError(
                f"{layout.replicas} replicas of {layout.shards} shards must fill {self.nodes} nodes of {self.gpus} "
                "GPUs, each shard group whole nodes or an even part of one"
            )
        return (
            replace(self, nodes=nodes, gpus=gpus),
            replace(self, nodes=self.nodes // nodes, gpus=self.gpus // gpus),
        )

    def ring(self, nbytes: float, calls: int = 1) -> float:
        """Seconds for every rank to receive `nbytes` in all-gathers or reduce-scatters; an all-reduce is one of each.

        Along its rail a rank receives the (nodes-1) shards of its place, within the node the other places' shares.
        """
        if self.ranks == 1:
            return 0.0
        whole = nbytes * self.ranks / (self.ranks - 1)
        across = (self.nodes - 1) * (whole / self.ranks / self.infiniband + calls * self.infiniband_latency)
        within = (self.gpus - 1) * (whole / self.gpus / self.nvlink + calls * self.nvlink_latency)
        return across + within

    def all_to_all(self, nbytes: float, calls: int = 1) -> float:
        """Seconds for every rank to receive `nbytes` in all, alike from each other rank; both links work at once."""
        if self.ranks == 1:
            return 0.0
        share = nbytes / (self.ranks - 1)
        across = (self.nodes - 1) * self.gpus * share / self.infiniband
        within = (self.gpus - 1) * share / self.nvlink
        return max(
            across + calls * (self.nodes > 1) * self.infiniband_latency,
            within + calls * (self.gpus > 1) * self.nvlink_latency,
        )


@dataclass(frozen=True)
class Volumes:
    """Bytes that a rank receives from the others in a step: of its shard group, and of the replicas of its shard.

    An all-reduce over r ranks counts as a ring's, 2(r-1)/r of its tensor.
    """

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_to_all: float = 0.0
    all_reduce: float = 0.0
    replica_all_gather: float = 0.0
    replica_all_reduce: float = 0.0

    def __add__(self, other: "Volumes") -> "Volumes":
        return Volumes(*(getattr(self, kind.name) + getattr(other, kind.name) for kind in fields(self)))


def all_reduced(nbytes: float, ranks: int) -> float:
    """Bytes that a rank receives in a ring's all-reduce: a reduce-scatter, then an all-gather."""
    return 2.0 * (ranks - 1) * nbytes / ranks


def sharded(shapes: Sequence[Shape], shards: int) -> list[int]:
    """Numbers of each parameter as FSDP2 sends them: rows padded to whole shards of ⌈rows / shards⌉."""
    return [-(-shape[0] // shards) * shards * math.prod(shape[1:]) for shape in shapes]


def fsdp_step(groups: Sequence[Sequence[Shape]], layout: Layout, *, reshard: bool) -> Volumes:
    """FSDP2 over the shapes of each group of parameters, as train/ranks/parallel.py sets it up.

    bf16 weights are gathered among the shards, once for forward and, where they are dropped after it, once more for
    backward: the root's too, as `reshard_after_forward` is given for it. float32 gradients are reduce-scattered among
    the shards, then each shard's sum is all-reduced over its replicas.
    """
    numbers = sum(sum(sharded(shapes, layout.shards)) for shapes in groups)
    others = (layout.shards - 1) / layout.shards
    return Volumes(
        all_gather=others * 2.0 * numbers * gathers(reshard=reshard),
        reduce_scatter=others * 4.0 * numbers,
        replica_all_reduce=all_reduced(4.0 * numbers / layout.shards, layout.replicas),
    )


def gathers(*, reshard: bool) -> int:
    """How often a step gathers a group's weights."""
    return 2 if reshard else 1


def gram_flop(shape: tuple[int, int]) -> float:
    """Operations of Newton-Schulz on one matrix as ours does it: Jordan's five steps, the cheaper of both forms."""
    standard = newton_schulz_flop(*shape, algorithm="standard")
    return min(newton_schulz_flop(*shape, algorithm="gram", restarts=(3,)), standard)


def muon_exchange(shapes: Sequence[tuple[int, int]], layout: Layout) -> Exchange:
    """Owners and buckets as `prx_kernels.Muon` plans them: matrices over all ranks, by the Gram form's work."""
    blocks = [Block(rows, 0, rows, columns, gram_flop((rows, columns))) for rows, columns in shapes]
    return Exchange(blocks, layout, torch.bfloat16, torch.device("meta"))


def muon_step(shapes: Sequence[tuple[int, int]], layout: Layout) -> Volumes:
    """Muon's exchange in bf16, of the rank that `layout` names.

    Among the shards, both ways: the rows of owned matrices that others hold, and own rows of the updates of matrices
    that others of this replica own. Rows lie in shards of ⌈rows / shards⌉, the last ones short or empty, unpadded.
    Then every replica's updates of these rows go to all other replicas, each bucket as wide as the fullest replica's.
    """
    exchange, received = muon_exchange(shapes, layout), 0
    for (height, width), owner in zip(shapes, exchange.owners, strict=True):
        chunk = -(-height // layout.shards)
        here = max(min((layout.shard + 1) * chunk, height) - layout.shard * chunk, 0)
        replica, shard = divmod(owner, layout.shards)
        if replica == layout.replica:
            received += width * ((height - here) if shard == layout.shard else here)
    updates = (layout.replicas - 1) * sum(bucket.width for bucket in exchange.buckets)
    return Volumes(all_to_all=2.0 * received, replica_all_gather=2.0 * updates)


def agreements(layout: Layout) -> Volumes:
    """Single numbers that the ranks agree on: the gradient's norm, and how many matrices are skipped."""
    norm, skipped = 4.0, 8.0
    return Volumes(all_reduce=all_reduced(norm + skipped, layout.shards))


def groups(model: nn.Module) -> tuple[list[list[Shape]], list[Shape]]:
    """Shapes of the parameters of every block, and of those outside of blocks: FSDP2's groups."""
    blocks = [[tuple(p.shape) for p in block.parameters()] for block in model.get_submodule("blocks").children()]
    root = [tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("blocks.")]
    return blocks, root
