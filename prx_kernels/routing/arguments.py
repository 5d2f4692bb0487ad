"""Where a routed block takes its arguments, and the entries of the kept tokens in those that have one a token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tokens import gather_tokens

Entries = int | tuple[int, ...] | Mapping[int, int | tuple[int, ...]]
"""Where in a per-token argument the entries of the tokens are, see `route_blocks`."""


class Argument:
    """Where a block's forward takes an argument: by name, and at a position where it may come without the name."""

    def __init__(self, name: str | None, position: int | None) -> None:
        self.name, self.position = name, position

    def __str__(self) -> str:
        return f"argument {self.name!r}" if self.name is not None else f"argument {self.position}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Argument) and (self.name, self.position) == (other.name, other.position)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def find(cls, block: nn.Module, which: int | str) -> Argument:
        parameters = list(inspect.signature(block.forward).parameters.values())
        kinds = {p.kind for p in parameters}
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = by_position + [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if isinstance(which, int) and 0 <= which < len(by_position):
            return cls(by_position[which], which)
        if isinstance(which, int) and which >= 0 and inspect.Parameter.VAR_POSITIONAL in kinds:
            return cls(None, which)
        if which in by_position:
            return cls(str(which), by_position.index(str(which)))
        if isinstance(which, str) and (which in names or inspect.Parameter.VAR_KEYWORD in kinds):
            return cls(which, None)
        raise ValueError(f"{type(block).__name__} has no argument {which!r}; its arguments are {', '.join(names)}")

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.name is not None and self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position is not None and self.position < len(args) else None

    def write(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name is not None and self.name in kwargs:
            return args, {**kwargs, self.name: value}
        assert self.position is not None
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


class RoutedTable:
    """A module with other buffers: what it computes with the entries of the kept tokens only."""

    def __init__(self, module: nn.Module, buffers: dict[str, Tensor]) -> None:
        self.module, self.buffers = module, buffers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, self.buffers, args, kwargs)


def positions(keep: Tensor, ahead: int) -> Tensor:
    """`keep` behind `ahead` tokens that are never routed."""
    if ahead == 0:
        return keep
    first = torch.arange(ahead, dtype=keep.dtype, device=keep.device).expand(keep.shape[0], ahead)
    return torch.cat((first, keep + ahead), dim=1)


def take(table: Any, dim: Entries, keep: Tensor, count: int, shared: bool, argument: Argument) -> Any:
    """The entries of the kept tokens in a per-token argument, which may be a tuple of tables."""
    if isinstance(dim, Mapping):
        if not isinstance(table, (tuple, list)) or not all(-len(table) <= i < len(table) for i in dim):
            raise TypeError(f"{argument} must be a tuple with values {list(dim)}, got {describe(table)}")
        some = {i % len(table): entries for i, entries in dim.items()}
        chosen = (
            take(value, some[i], keep, count, shared, argument) if i in some else value for i, value in enumerate(table)
        )
        return tuple_like(table, chosen)
    if isinstance(table, (tuple, list)):
        return tuple_like(table, (take(entry, dim, keep, count, shared, argument) for entry in table))
    if isinstance(table, dict):
        return {name: take(entry, dim, keep, count, shared, argument) for name, entry in table.items()}
    if isinstance(dim, tuple):
        for one in dim:
            table = take(table, one, keep, count, shared, argument)
        return table
    if isinstance(table, nn.Module):  # a callable rotary embedding (EVA, JiT, LightningDiT) keeps tables as buffers
        taken = {n: take(b, dim, keep, count, shared, argument) for n, b in table.named_buffers() if b.ndim}
        return RoutedTable(table, taken)
    if not isinstance(table, Tensor):
        raise TypeError(f"{argument} must be a tensor, a tuple or dict of them or a module with buffers, to be routed")
    ahead = table.shape[dim] - count
    if ahead < 0:
        raise ValueError(f"{argument} has {table.shape[dim]} entries in dimension {dim} for {count} tokens")
    rows = positions(keep, ahead)
    if shared:
        return table.index_select(dim, rows[0])
    batch = keep.shape[0]
    if dim % table.ndim == 0 or table.shape[0] not in (1, batch):
        raise ValueError(
            f"{argument} of shape {tuple(table.shape)} is one table for the whole batch of {batch}: "
            "pass shared=True to keep the same tokens in every sample"
        )
    whole = table.expand(batch, *table.shape[1:]).movedim(dim, 1)
    return gather_tokens(whole, rows).movedim(1, dim)


def tuple_like(like: Any, values: Iterable[Any]) -> Any:
    """A tuple, list or named tuple of other values."""
    return type(like)._make(values) if hasattr(like, "_make") else type(like)(values)


def describe(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    return f"{len(result)} values" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"
