"""What a block is given beside its tokens, and the entries of the kept tokens in what has one a token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .tokens import gather_tokens

# --- public ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """Where in a per-token argument of `route_blocks` the entries of the tokens are, if others stand beside them.

    A mask over [image, text] along its last dimension is `Entries(3, suffix="rest")`, a rotary table of [text, image]
    `Entries(0, prefix="rest")`. Alone, a number is a dimension with an entry for every token, those that are never
    routed included or not.

    Attributes:
        dim: the dimension of the entries; of a square mask both.
        prefix, suffix: entries ahead of and behind those of the routed tokens, which stay: a number, or "rest", which
            is as many as there are more.
    """

    dim: int | tuple[int, ...]
    prefix: int | Literal["rest"] = 0
    suffix: int | Literal["rest"] = 0

    def __post_init__(self) -> None:
        if self.prefix == "rest" and self.suffix == "rest":
            raise ValueError('Entries: only one of prefix and suffix can be the "rest"')
        for name, value in (("prefix", self.prefix), ("suffix", self.suffix)):
            if value != "rest" and not (isinstance(value, int) and value >= 0):
                raise ValueError(f'Entries: {name} must be a number of entries or "rest", got {value!r}')


Where = int | tuple[int, ...] | Entries | Mapping[int | str, Any] | None
"""A value of `per_token`: dimensions, an `Entries`, or of a tuple or dict what holds for some of its values."""


@dataclass(frozen=True)
class Span:
    """Tokens of a stream: `count` that may be routed, and those ahead of and behind them, which never are."""

    count: int
    prefix: int
    suffix: int

    def locate(self, size: int, where: Entries) -> tuple[int, int] | None:
        """How many of `size` entries stand ahead of and behind the routed tokens'; None if they do not fit."""
        ahead, behind = where.prefix, where.suffix
        if ahead == 0 and behind == 0:
            if size == self.prefix + self.count + self.suffix:
                return self.prefix, self.suffix
            return (0, 0) if size == self.count else None
        if ahead == "rest":
            ahead = size - self.count - int(behind)
        elif behind == "rest":
            behind = size - self.count - ahead
        fits = ahead >= 0 and int(behind) >= 0 and ahead + self.count + int(behind) == size
        return (ahead, int(behind)) if fits else None


# --- taking entries ----------------------------------------------------------------------------------------------


def positions(keep: Tensor, count: int, ahead: int, behind: int) -> Tensor:
    """Rows of the kept tokens, where `ahead` rows stand before the `count` routed ones and `behind` after them."""
    if ahead == 0 and behind == 0:
        return keep
    rows = [keep + ahead]
    if ahead:
        rows.insert(0, _range(keep, 0, ahead))
    if behind:
        rows.append(_range(keep, ahead + count, behind))
    return torch.cat(rows, dim=1)


def _range(keep: Tensor, first: int, number: int) -> Tensor:
    rows = torch.arange(first, first + number, dtype=keep.dtype, device=keep.device)
    return rows.expand(keep.shape[0], number)


def take(table: Any, where: Where, keep: Tensor, span: Span, shared: bool, name: str) -> Any:
    """The entries of the kept tokens in a per-token argument, and of everything else what was there."""
    if table is None or where is None:
        return table
    if isinstance(where, Mapping):
        return _take_some(table, where, keep, span, shared, name)
    if isinstance(table, (tuple, list)):
        chosen = (take(entry, where, keep, span, shared, f"{name}[{i}]") for i, entry in enumerate(table))
        return tuple_like(table, chosen)
    if isinstance(table, dict):
        return {key: take(entry, where, keep, span, shared, f"{name}[{key!r}]") for key, entry in table.items()}
    entries = where if isinstance(where, Entries) else Entries(where)
    if isinstance(table, Tensor):
        for dim in dimensions(entries):
            table = _take_rows(table, dim, entries, keep, span, shared, name)
        return table
    if not hasattr(table, "__dict__"):
        raise TypeError(
            f"{name} must be a tensor, a tuple or dict of them or a module that holds them, to be routed, got a "
            f"{type(table).__name__}"
        )
    # A callable rotary embedding (EVA, JiT, LightningDiT) keeps its tables as buffers, attributes or in lists.
    change = functools.partial(_take_if_it_fits, entries=entries, keep=keep, span=span, shared=shared, name=name)
    routed = changed(table, change, top=True)
    if routed is None:
        have = ", ".join(f"{path} {tuple(t.shape)}" for path, t in tensors_of(table)) or "none"
        raise ValueError(
            f"{name} ({type(table).__name__}) holds no tensor with an entry for each of {span.count} tokens in "
            f"dimension {entries.dim}; its tensors: {have}"
        )
    return routed


def _take_if_it_fits(table: Tensor, *, entries: Entries, keep: Tensor, span: Span, shared: bool, name: str) -> Any:
    return take(table, entries, keep, span, shared, name) if fits(table, entries, span) else None


def _take_some(table: Any, where: Mapping[Any, Any], keep: Tensor, span: Span, shared: bool, name: str) -> Any:
    if isinstance(table, dict):
        if any(key not in table for key in where):
            raise TypeError(f"{name} must be a dict with {list(where)}, got {list(table)}")
        chosen = {key: take(table[key], at, keep, span, shared, f"{name}[{key!r}]") for key, at in where.items()}
        return {**table, **chosen}
    numbers = isinstance(table, (tuple, list)) and all(isinstance(i, int) for i in where)
    if not numbers or not all(-len(table) <= i < len(table) for i in where):
        raise TypeError(f"{name} must be a tuple with values {list(where)}, got {describe(table)}")
    values = list(table)
    for i, at in where.items():
        values[i] = take(values[i], at, keep, span, shared, f"{name}[{i}]")
    return tuple_like(table, values)


def _take_rows(table: Tensor, dim: int, where: Entries, keep: Tensor, span: Span, shared: bool, name: str) -> Tensor:
    if not -table.ndim <= dim < table.ndim:
        raise ValueError(f"{name} of shape {tuple(table.shape)} has no dimension {dim}")
    size = table.shape[dim]
    place = span.locate(size, where)
    if place is None:
        raise ValueError(_misfit(size, dim, where, span, name))
    rows = positions(keep, span.count, *place)
    if shared:
        return table.index_select(dim, rows[0])
    batch = keep.shape[0]
    if dim % table.ndim == 0 or table.shape[0] not in (1, batch):
        raise ValueError(
            f"{name} of shape {tuple(table.shape)} is one table for the whole batch of {batch}: "
            "pass shared=True to keep the same tokens in every sample"
        )
    whole = table.expand(batch, *table.shape[1:]).movedim(dim, 1)
    return gather_tokens(whole, rows).movedim(1, dim)


def _misfit(size: int, dim: int, where: Entries, span: Span, name: str) -> str:
    tokens = span.prefix + span.count + span.suffix
    text = f"{name} has {size} entries in dimension {dim} for {tokens} tokens"
    if where.prefix or where.suffix:
        return f"{text}, {span.count} of them routed, which does not fit {where}"
    if size > tokens:
        text += (
            f": say where the other {size - tokens} stand, with Entries({dim}, "
            f'prefix="rest") if ahead of the tokens\' own, suffix="rest" if behind'
        )
    return text


# --- tensors inside of things ------------------------------------------------------------------------------------


def tensors_of(holder: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that an object or module keeps as attributes, buffers or in lists, by path; also what its submodules do.

    Parameters count where they are a class's own; those of torch.nn's layers are weights, not tables.
    """
    for name, value in attributes_of(holder).items():
        yield from leaves(value, name)


def attributes_of(holder: Any) -> dict[str, Any]:
    kept = {name: value for name, value in holder.__dict__.items() if not name.startswith("__")}
    if not isinstance(holder, nn.Module):
        return kept
    own = type(holder).__module__.startswith(("torch.nn.", "torch.ao.", "torchao."))
    mine = {n: v for n, v in kept.items() if not n.startswith("_") or isinstance(v, (Tensor, list, tuple))}
    mine |= {} if own else {**holder._parameters, **holder._buffers}
    return {**mine, **holder._modules}


def leaves(value: Any, name: str, top: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Tensors in a value, by path: of a tensor itself, of tuples, lists and dicts, of modules, of an object on top."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, entry in enumerate(value):
            yield from leaves(entry, f"{name}.{i}")
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{name}.{key}")
    elif isinstance(value, nn.Module) or (top and _is_plain_object(value)):
        for path, tensor in tensors_of(value):
            yield f"{name}.{path}", tensor


def changed(value: Any, change: Callable[[Tensor], Tensor | None], top: bool = False) -> Any:
    """A value with other tensors where `change` gives one, and None if it never does. The original is not touched:
    another thread may be using it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        values = [changed(entry, change) for entry in value]
        if all(entry is None for entry in values):
            return None
        return tuple_like(value, (old if new is None else new for old, new in zip(value, values, strict=True)))
    if isinstance(value, dict):
        found = {key: new for key, old in value.items() if (new := changed(old, change)) is not None}
        return {**value, **found} if found else None
    if not isinstance(value, nn.Module) and not (top and _is_plain_object(value)):
        return None
    found = {name: new for name, old in attributes_of(value).items() if (new := changed(old, change)) is not None}
    return _copied(value, found) if found else None


def with_value(holder: Any, path: str, value: Any) -> Any:
    """A shallow copy of an object in which another value stands at this path."""
    first, _, rest = path.partition(".")
    inner = with_value(at(holder, first), rest, value) if rest else value
    if isinstance(holder, dict):
        return {key: inner if str(key) == first else old for key, old in holder.items()}
    if isinstance(holder, (tuple, list)):
        return tuple_like(holder, (inner if str(i) == first else old for i, old in enumerate(holder)))
    return _copied(holder, {first: inner})


def at(holder: Any, name: str) -> Any:
    """What stands under a part of a path in an object, list or dict."""
    if isinstance(holder, dict):
        return next(value for key, value in holder.items() if str(key) == name)
    return holder[int(name)] if isinstance(holder, (tuple, list)) else getattr(holder, name)


def _is_plain_object(value: Any) -> bool:
    """Whether it is an instance of somebody's class that keeps its state in attributes, as a table of angles may be."""
    kind = type(value)
    return hasattr(value, "__dict__") and kind.__module__ not in ("builtins", "functools", "types", "torch")


def _copied(holder: Any, values: Mapping[str, Any]) -> Any:
    twin = object.__new__(type(holder))
    for name, value in holder.__dict__.items():
        twin.__dict__[name] = value
    for kind in ("_parameters", "_buffers", "_modules") if isinstance(holder, nn.Module) else ():
        found = {name: value for name, value in values.items() if name in holder.__dict__[kind]}
        if found and kind == "_parameters":  # gathered rows are no parameters: an attribute goes first
            twin.__dict__.update(found)
        elif found:
            twin.__dict__[kind] = {**holder.__dict__[kind], **found}
        values = {name: value for name, value in values.items() if name not in found}
    twin.__dict__.update(values)
    return twin


# --- small things ------------------------------------------------------------------------------------------------


def dimensions(where: Entries) -> tuple[int, ...]:
    return where.dim if isinstance(where.dim, tuple) else (where.dim,)


def fits(table: Tensor, where: Entries, span: Span) -> bool:
    """Whether the tensor has entries of the tokens in every dimension named."""
    dims = dimensions(where)
    there = all(-table.ndim <= dim < table.ndim for dim in dims)
    return there and all(span.locate(table.shape[dim], where) is not None for dim in dims)


def tuple_like(like: Any, values: Iterable[Any]) -> Any:
    """A tuple, list or named tuple of other values."""
    return type(like)._make(values) if hasattr(like, "_make") else type(like)(values)


def describe(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    return f"{len(result)} values" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"
