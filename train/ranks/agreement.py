"""Agreements between ranks on the host: what one found, all know, and all raise what one raised."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from train.errors import UserError, of_the_system

T = TypeVar("T")
Group = dist.ProcessGroup | None
"""A group with a gloo backend; none for a process alone."""


def gather(value: T, group: Group) -> list[T]:
    """Every rank's value, by rank, on every rank; collective."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first(function: Callable[[], T], group: Group) -> T:
    """Call a function on rank 0 and give its result to every rank; collective.

    Raises:
        UserError: on every rank, where the function raised it or an OSError on rank 0.
    """
    outcome: list[Any] = [None, None]
    if group is None or dist.get_rank(group) == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = of_the_system(error)
    if group is not None:
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return cast(T, outcome[0])
