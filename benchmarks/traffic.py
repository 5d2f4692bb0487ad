"""Count the bytes that an eager function moves: what each of its ops reads and writes, views and sizes left out.

This is a count, not a measurement: it runs anywhere, and says what a way of doing things costs before any kernel is
timed. Ops that pick rows are charged for the rows that they pick, and for their index.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.clock import tensors

# Ops that read as much of their first tensor as they write, not the whole of it.
_PICKS_ROWS = {"gather", "index_select", "index", "take_along_dim"}
_FILLS = {"zeros", "new_zeros", "zeros_like", "ones_like", "full_like", "new_full", "zero_", "fill_"}
_ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class EagerTraffic(TorchDispatchMode):
    """Adds up `nbytes` while it is on.

    `custom` gives the bytes of ops by their name, for those that read or write parts of their tensors.
    """

    def __init__(self, custom: dict[str, Callable[..., float]] | None = None) -> None:
        super().__init__()
        self.nbytes = 0.0
        self.custom = custom or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in self.custom:
            self.nbytes += self.custom[name](*args)
        elif not func.is_view and name not in _ALLOCATES:
            self.nbytes += _moved(name, (args, kwargs), result)
        return result


def _moved(name: str, inputs: Any, result: Any) -> float:
    read = [_size(t) for t in tensors(inputs)]
    written = [_size(t) for t in tensors(result)]
    if name in _PICKS_ROWS and read:
        read[0] = min(read[0], sum(written))
    if name in _FILLS:
        read = []
    if name in ("scatter_", "copy_") and read:
        # In place: the first tensor is written where the source says, and not read.
        source = read[-1]
        return float(sum(read[1:]) + source)
    if name == "scatter" and len(read) > 1:
        # A copy, then the rows: the source is read and written over it.
        return float(sum(read) + sum(written) + read[-1])
    return float(sum(read) + sum(written))


def _size(tensor: Tensor) -> int:
    """Bytes that a tensor's elements occupy: an expanded dimension is read from the cache, and costs once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 else size
    return elements * tensor.element_size()
