"""What crosses from the host to a pretended GPU inside, and what of it the host would wait for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Crossing:
    """A tensor that an operation took from one device to another."""

    operation: str
    dtype: torch.dtype
    blocking: bool
    """The host waits until the device has done all before it."""

    def __str__(self) -> str:
        return f"{'blocking ' if self.blocking else ''}{self.operation} of {self.dtype}"


class Crossings(TorchDispatchMode):
    """Lists the operations inside that take tensors of the host and give or change ones of the GPU, or the reverse.

    Numbers of no dimension beside tensors of the GPU are arguments of a kernel, and cross nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Crossing] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in ((args, kwargs or {}), out)
        )
        copies = func.name().split(".")[0] in ("aten::_to_copy", "aten::copy_")
        devices = {x.device.type for x in given + made if copies or x.dim()}
        if len(devices) > 1:
            asynchronous = (kwargs or {}).get("non_blocking", False) or (
                func.name().startswith("aten::copy_") and len(args) > 2 and args[2]
            )
            source = args[1] if func.name().startswith("aten::copy_") else given[0]
            self.seen.append(Crossing(func.name(), source.dtype, not asynchronous))
        return out

    @property
    def waits(self) -> list[str]:
        """Those that the host waits for, and those of numbers that it has computed where the GPU could have.

        Integers that cross beside the computation are a step's inputs: seeds, ids, places.
        """
        return [str(each) for each in self.seen if each.blocking or each.dtype.is_floating_point]
