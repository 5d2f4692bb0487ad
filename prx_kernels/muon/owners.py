"""Which rank orthogonalises which matrix, and where its rows lie: arithmetic that every rank does alike, nothing sent.

A matrix is whole on one rank only, its owner. Owners are chosen for all matrices at once, the most expensive first,
each to the rank with the least to do.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# --- public ------------------------------------------------------------------------------------------------------


def assign_owners(costs: Sequence[float], ranks: int) -> list[int]:
    """Spread work over ranks, longest processing time first.

    The fullest rank has at most 4/3 - 1/(3·ranks) times the work of the fullest one at the best (Graham, "Bounds on
    multiprocessing timing anomalies", 1969). Ties go to the lower rank and to the earlier item: every rank that calls
    this gets the same owners.

    Args:
        costs: of each item, in any unit, finite and not negative.
        ranks: number of ranks, at least 1.

    Returns:
        The rank of each item.

    Raises:
        ValueError: there is no rank, or a cost is negative or not finite.
    """
    if ranks < 1:
        raise ValueError(f"work needs at least one rank to go to, got {ranks}")
    for cost in costs:
        if not 0 <= cost < math.inf:
            raise ValueError(f"costs must be finite and not negative, got {cost}")
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owner = heapq.heappop(loads)
        owners[item] = owner
        heapq.heappush(loads, (load + costs[item], owner))
    return owners


# --- where a parameter lies --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The ranks that share a parameter: `shards` of its rows, and `replicas` of those. Groups are None for one rank."""

    shards: int = 1
    shard: int = 0  # this rank among the shards
    shard_group: Any = None
    replicas: int = 1
    replica: int = 0
    replica_group: Any = None

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, without importing what would define one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    part: Tensor = x.to_local() if is_dtensor(x) else x
    return part


def gradient(param: Any) -> Tensor:
    """This rank's part of a parameter's gradient, placed as the parameter: where it is not, all ranks must ask for it.

    Raises:
        TypeError: it is sparse.
    """
    grad = param.grad
    if grad.layout != torch.strided:
        raise TypeError(f"Muon needs dense gradients, got one of layout {grad.layout} and shape {tuple(grad.shape)}")
    if is_dtensor(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local(grad)


def layout_of(param: Any, mesh: Any, label: str) -> Layout:
    """How a parameter lies over ranks, from its placements and from the mesh given to the optimizer.

    A DTensor may have its rows sharded on one mesh dimension and be replicated on one other (FSDP2, HSDP). Dimensions
    of `mesh` that the parameter's mesh lacks hold replicas. A plain tensor is replicated over the largest dimension of
    `mesh`, and is this rank's alone where no mesh is given.

    Raises:
        ValueError: the parameter's mesh is not in `mesh`, or its placements are others.
    """
    if not is_dtensor(param):
        if mesh is None:
            return Layout()
        largest = max(range(mesh.ndim), key=mesh.size)
        return _layout(mesh, None, largest if mesh.size(largest) > 1 else None)
    own = param.device_mesh
    sharded, replicated = [], []
    for dim, placement in enumerate(param.placements):
        if own.size(dim) == 1:
            continue
        if placement.is_replicate():
            replicated.append((own, dim))
        elif type(placement).__name__ == "Shard" and placement.dim == 0:
            sharded.append((own, dim))
        else:
            raise ValueError(
                f"Muon needs rows sharded (Shard(0)) or replicated on every mesh dimension, "
                f"but {label} has placements {tuple(param.placements)}"
            )
    if mesh is not None:
        replicated += [(mesh, dim) for dim in _other_dims(own, mesh, label) if mesh.size(dim) > 1]
    if len(sharded) > 1 or len(replicated) > 1:
        raise ValueError(
            f"Muon takes one mesh dimension of shards and one of replicas, but {label} has placements "
            f"{tuple(param.placements)} on a mesh of shape {tuple((mesh or own).shape)}"
        )
    shards = _layout(own, sharded[0][1] if sharded else None, None)
    copies = _layout(replicated[0][0], None, replicated[0][1]) if replicated else Layout()
    return Layout(
        shards.shards, shards.shard, shards.shard_group, copies.replicas, copies.replica, copies.replica_group
    )


def _layout(mesh: Any, shard_dim: int | None, replica_dim: int | None) -> Layout:
    def describe(dim: int | None) -> tuple[int, int, Any]:
        return (1, 0, None) if dim is None else (mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))

    return Layout(*describe(shard_dim), *describe(replica_dim))


def _other_dims(own: Any, mesh: Any, label: str) -> list[int]:
    """Dimensions of `mesh` that `own`, a part of it by its ranks, lacks."""
    ranks, here = own.mesh.tolist(), mesh.get_coordinate()
    if ranks == mesh.mesh.tolist():
        return []
    for dim in range(mesh.ndim) if here is not None else ():
        line = mesh.mesh[tuple(slice(None) if d == dim else at for d, at in enumerate(here))]
        if ranks == line.tolist():
            return [other for other in range(mesh.ndim) if other != dim]
    raise ValueError(f"distributed_mesh {mesh} does not contain the mesh of {label}, {own}")


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One matrix to orthogonalise: rows `row` to `row + rows` of a parameter of `height` rows."""

    height: int
    row: int
    rows: int
    columns: int
    cost: float

    def rows_of(self, shard: int, shards: int) -> tuple[int, int]:
        """First and last + 1 of this block's rows on a shard, counted from the shard's first row (equal if none)."""
        first, last = shard_rows(self.height, shard, shards)
        start = min(max(self.row, first), last)
        stop = max(min(self.row + self.rows, last), start)
        return start - first, stop - first

    def elements_of(self, shard: int, shards: int) -> int:
        start, stop = self.rows_of(shard, shards)
        return (stop - start) * self.columns


def shard_rows(height: int, shard: int, shards: int) -> tuple[int, int]:
    """First and last + 1 row of a shard: blocks of ⌈height / shards⌉ rows, the last ones short or empty, as DTensor."""
    chunk = -(-height // shards)
    return min(shard * chunk, height), min((shard + 1) * chunk, height)
