"""Bytes that a step's collectives move by formula, how long a network takes for them, and what really moved.

Volumes are bytes that one rank receives from the others in a step. `python -m benchmarks.project --check` holds the
formulas to `Moved`'s count of a real step on 2 and 4 gloo ranks.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import newton_schulz
from prx_kernels import assign_owners

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

    def all_gather(self, nbytes: float) -> float:
        """Seconds to have `nbytes`, sharded over all ranks, on every rank; a reduce-scatter takes as long.

        Along its rail a rank receives the (nodes-1) shards of its place, within the node the other places' shares.
        """
        across = (self.nodes - 1) * (nbytes / self.ranks / self.infiniband + self.infiniband_latency)
        within = (self.gpus - 1) * (nbytes / self.gpus / self.nvlink + self.nvlink_latency)
        return across + within

    def all_to_all(self, nbytes: float) -> float:
        """Seconds for every rank to receive `nbytes` in all, alike from each other rank; both links work at once."""
        if self.ranks == 1:
            return 0.0
        share = nbytes / (self.ranks - 1)
        across = (self.nodes - 1) * self.gpus * share / self.infiniband + (self.nodes > 1) * self.infiniband_latency
        within = (self.gpus - 1) * share / self.nvlink + (self.gpus > 1) * self.nvlink_latency
        return max(across, within)


@dataclass(frozen=True)
class Volumes:
    """Bytes that a rank receives from the others in a step."""

    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    all_to_all: float = 0.0


def sharded(shapes: Sequence[Shape], ranks: int) -> list[int]:
    """Numbers of each parameter as FSDP2 sends them: rows padded to whole shards of ⌈rows / ranks⌉."""
    return [-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in shapes]


def fsdp_step(blocks: Sequence[Sequence[Shape]], root: Sequence[Shape], ranks: int) -> Volumes:
    """FSDP2 with a group a block, bf16 parameters and fp32 gradients (DESIGN.md's policy).

    Blocks are freed after their forward, so they are gathered twice a step; what the root holds is gathered once.
    """
    in_blocks = sum(sum(sharded(shapes, ranks)) for shapes in blocks)
    in_root = sum(sharded(root, ranks))
    others = (ranks - 1) / ranks
    return Volumes(others * 2.0 * (2 * in_blocks + in_root), others * 4.0 * (in_blocks + in_root))


def muon_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """Which rank orthogonalises each matrix, as `prx_kernels.Muon` assigns them: by the Gram form's work."""
    return assign_owners([gram_flop(shape) for shape in shapes], ranks)


def gram_flop(shape: tuple[int, int]) -> float:
    """Operations of Newton-Schulz on one matrix as ours does it: Jordan's five steps, the cheaper of both forms."""
    return min(newton_schulz([shape], algorithm) for algorithm in ("gram", "standard"))


def muon_step(shapes: Sequence[tuple[int, int]], ranks: int, rank: int) -> Volumes:
    """Muon's exchange, both ways in bf16: the rows of owned matrices that others hold, and own rows of others' updates.

    Rows lie in shards of ⌈rows / ranks⌉, the last ones short or empty; nothing is padded on the way.
    """

    def rows(height: int) -> int:
        chunk = -(-height // ranks)
        return max(min((rank + 1) * chunk, height) - rank * chunk, 0)

    received = 0
    for (height, width), owner in zip(shapes, muon_owners(shapes, ranks), strict=True):
        here = rows(height)
        received += width * ((height - here) if owner == rank else here)
    return Volumes(all_to_all=2.0 * received)


class Moved(TorchDispatchMode):
    """Counts what collectives of torch.distributed move while it is on: bytes received from other ranks, by kind.

    Each op's tensors are looked at as it is launched, so what is counted is what is given to the backend, whoever
    calls it: FSDP2, an optimizer, a loss.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "_allgather_base_":
            self._add("all_gather", _size(args[0]) - _size(args[1]))
        elif name == "_reduce_scatter_base_":
            # The partial sums of the other ranks for this rank's share.
            self._add("reduce_scatter", _size(args[1]) - _size(args[0]))
        elif name == "alltoall_base_":
            output, splits = args[0], args[3]
            row = _size(output) // max(output.shape[0], 1)
            self._add("all_to_all", _size(output) - (splits[self.rank] * row if splits else 0))
        elif name == "allreduce_":
            self._add("all_reduce", sum(_size(tensor) for tensor in args[0]))
        elif name not in ("barrier", "monitored_barrier_"):
            raise ValueError(f"collective {name} is not counted; benchmarks/collectives.py knows no formula for it")

    def _add(self, kind: str, nbytes: int) -> None:
        self.nbytes[kind] += nbytes
        self.calls[kind] += 1


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
