"""Bytes that collectives of torch.distributed really move: what train/run/collectives.py's formulas are held to."""

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.run.collectives import all_reduced


class Moved(TorchDispatchMode):
    """Counts what collectives of torch.distributed move while it is on: bytes received from other ranks, by kind.

    Each op's tensors are looked at as it is launched, so what is counted is what is given to the backend, whoever
    calls it: FSDP2, an optimizer, a loss. Kinds are the fields of `Volumes`; those over `replicas` begin so.
    """

    def __init__(self, replicas: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.replicas = replicas
        self.nbytes: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "_allgather_base_":
            self._add("all_gather", args[2], _size(args[0]) - _size(args[1]))
        elif name == "_reduce_scatter_base_":
            # The partial sums of the other ranks for this rank's share.
            self._add("reduce_scatter", args[2], _size(args[1]) - _size(args[0]))
        elif name == "alltoall_base_":
            output, group, splits = args[0], dist.ProcessGroup.unbox(args[2]), args[3]
            row = _size(output) // max(output.shape[0], 1)
            own = splits[group.rank()] * row if splits else _size(output) // group.size()
            self._add("all_to_all", args[2], _size(output) - own)
        elif name == "allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self._add("all_reduce", args[1], sum(all_reduced(_size(tensor), ranks) for tensor in args[0]))
        elif name not in ("barrier", "monitored_barrier_"):
            raise ValueError(f"collective {name} is not counted; train/run/collectives.py knows no formula for it")

    def _add(self, kind: str, group: Any, nbytes: float) -> None:
        name = dist.ProcessGroup.unbox(group).group_name
        over_replicas = self.replicas is not None and name == self.replicas.group_name
        self.nbytes[f"replica_{kind}" if over_replicas else kind] += nbytes


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
