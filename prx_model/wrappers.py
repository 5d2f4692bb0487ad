"""Names of weights without what wrappers put into them: torch.compile, DDP, FSDP, checkpointing, nested or by block."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""torch.compile; DistributedDataParallel, DataParallel and AveragedModel; FSDP 1; activation checkpointing."""


def unwrapped(state: Mapping[str, T]) -> dict[str, T]:
    """The same values under names without the parts that wrappers add, wherever in a name they stand.

    Raises:
        ValueError: two names would become one.
    """
    found: dict[str, T] = {}
    for name, value in state.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in found:
            raise ValueError(f"{name!r} and another name are both {bare!r} without the prefixes of wrappers")
        found[bare] = value
    return found
