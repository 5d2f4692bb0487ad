"""Arguments and tensors that seem to have an entry a token and are not named, found by their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import bound
from .entries import Entries, Where, leaves, tensors_of
from .passage import Stop

OURS = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Suspect:
    """A tensor that a block is given or keeps.

    Attributes:
        name: what `per_token` calls it: an argument, or the path of a tensor that the block keeps.
        path: of the tensor inside of it.
        dims: dimensions with an entry for every token.
        more: how many entries more there are than tokens.
        given: whether it is an argument.
        certain: nothing else that is known has this size.
        batched: whether it has entries for every sample, or for any (size 1), in front of those of tokens.
        stream: whether it is like the tokens themselves, as what a skip connection brings.
    """

    name: str
    path: str
    dims: tuple[int, ...]
    more: int
    given: bool
    certain: bool
    batched: bool
    stream: bool
    shape: tuple[int, ...]

    def __str__(self) -> str:
        what = f"argument {self.name!r}" if self.given else f"its own tensor {self.name!r}"
        inside = f" (in {self.path})" if self.path != self.name else ""
        dims = " and ".join(map(str, self.dims))
        more = f", {self.more} more than tokens" if self.more else ""
        return f"{what}{inside} of shape {self.shape} has {self.shape[self.dims[0]]} entries in dimension {dims}{more}"

    def where(self, ahead: bool = True) -> Where:
        dims = self.dims[0] if len(self.dims) == 1 else self.dims
        if not self.more:
            return dims
        return Entries(dims, prefix="rest") if ahead else Entries(dims, suffix="rest")


def look(stop: Stop, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where something has an entry a token and is not named."""
    x = stop.places.tokens.read(args, kwargs)
    if not isinstance(x, Tensor) or x.ndim != 3:
        return
    certain = [s for s in suspects(stop, block, args, kwargs) if s.certain and not s.more]
    if certain:
        names = ", ".join(f'"{name}": None' for name in dict.fromkeys(s.name for s in certain))
        raise ValueError(
            f"{_title(stop, block)}: {_list(certain)}, one for every token, and would keep all of them where the block "
            f"gets only some of the tokens. Write route_blocks(…, {call(certain)}); if they are not the tokens', "
            f"per_token={{{names}}}"
        )


def explain(
    block: Any, active: list[Stop], args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> str | None:
    """What to write against a failure inside of a routed block; None where nothing is known or it is no such one."""
    if not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError) or is_ours(error):
        return None
    for stop in active:
        found = suspects(stop, block, args, kwargs)
        if found:
            first = (str(error).splitlines() or [""])[0]
            return (
                f"{_title(stop, block)} failed on the tokens that its route keeps ({first}). There {_list(found)}. "
                f"If these are the tokens', write route_blocks(…, {call(found)}){_beside(found)}{skipped(found)}"
            )
    return None


def call(found: Sequence[Suspect]) -> str:
    """The arguments of `route_blocks` that name what was found."""
    return written(named(found), any(not s.batched for s in found))


def skipped(found: Iterable[Suspect]) -> str:
    """What to do where a block takes an earlier block's tokens."""
    names = " and ".join(dict.fromkeys(repr(s.name) for s in found if s.stream))
    if not names:
        return ""
    return (
        f". If {names} is what an earlier block gave (a skip connection), both blocks must be in the route or both "
        "outside of it: choose a start and an end that lie alike, as 1 and -2"
    )


def written(tables: Mapping[str, Where], shared: bool) -> str:
    """The arguments of `route_blocks`, as code."""
    shown = ", ".join(f'"{name}": {_shown(where)}' for name, where in tables.items())
    return f"per_token={{{shown}}}" + (", shared=True" if shared else "")


def named(found: Iterable[Suspect], ahead: bool = True) -> dict[str, Where]:
    """`per_token` for what was found: one place for an argument where it holds for all of that, else by its parts."""
    groups: dict[str, list[Suspect]] = {}
    for suspect in found:
        groups.setdefault(suspect.name, []).append(suspect)
    tables: dict[str, Where] = {}
    for name, members in groups.items():
        places = [member.where(ahead) for member in members]
        inner = {m.path.removeprefix(f"{name}.").split(".")[0]: p for m, p in zip(members, places, strict=True)}
        if all(place == places[0] for place in places):
            tables[name] = places[0]
        else:
            tables[name] = {int(key) if key.isdigit() else key: place for key, place in inner.items()}
    return tables


def suspects(
    stop: Stop, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int | None = None
) -> list[Suspect]:
    """All that may have an entry a token and is not named, certain or not. A dense stream has `tokens` in front."""
    x = stop.places.tokens.read(args, kwargs)
    try:
        given = bound(block, args, kwargs)
    except TypeError:  # a call that does not fit fails with a better message
        return []
    known = _known(block)
    values = {name: value for name, value in given.items() if name not in known}
    sizes = _sizes(stop, x) if tokens is None else _dense_sizes(stop, x, tokens)
    streams = [t for name, v in values.items() for _, t in leaves(v, name, True) if _is_stream(t, x)]
    twins = any(t.shape[1] in sizes for t in streams)
    longer = {size + t.shape[1] for size in sizes for t in streams}
    found: list[Suspect] = []
    for name, value in values.items():
        for path, t in leaves(value, name, True):
            found += _judge(name, path, t, x, sizes, longer, given=True, doubt=twins)
    for path, t in tensors_of(block):
        if not any(path == k or path.startswith(f"{k}.") for k in known):
            # What has a history is no table: a block noted it in an earlier forward (SpeedrunDiT's values).
            doubt = isinstance(t, nn.Parameter) or t.ndim < 2 or t.grad_fn is not None
            found += _judge(path, path, t, x, sizes, longer, given=False, doubt=doubt)
    certain = [s for s in found if s.certain]
    return certain or [s for s in found if s.given or s.certain]


def _judge(
    name: str, path: str, t: Tensor, x: Tensor, sizes: set[int], longer: set[int], *, given: bool, doubt: bool
) -> Iterator[Suspect]:
    batch, _, hidden = x.shape
    for wanted in (sizes, longer - sizes):
        dims = tuple(d for d, size in enumerate(t.shape) if size in wanted and not (d == 0 and size == batch))
        sure = tuple(d for d in dims if not (d == t.ndim - 1 and t.shape[d] == hidden))
        if not dims or (not given and not sure):
            continue
        dims = tuple(d for d in sure or dims if t.shape[d] == t.shape[(sure or dims)[0]])
        if t.ndim == 2 and path != name:  # tables in a tuple or module: as many features as tokens, not a square mask
            dims = dims[:1]
        certain = bool(sure) and not doubt and not _is_stream(t, x)
        batched = dims[0] > 0 and t.shape[0] in (1, batch)
        more = t.shape[dims[0]] - max(sizes) if wanted is not sizes else 0
        stream = given and _is_stream(t, x) and t.shape[-1] == hidden
        yield Suspect(name, path, dims, more, given, certain, batched, stream, tuple(t.shape))
        return


def _sizes(stop: Stop, x: Tensor) -> set[int]:
    """Entries of all tokens, and of those that may be routed."""
    route = stop.route
    ahead, behind = route._ends
    whole = x.shape[1] if stop.first or route.now.byp is None else route.now.byp.shape[1]
    sizes = {whole, whole - ahead - behind}
    if not stop.first and "rest" in (stop.places.prefix, stop.places.suffix) and route.now.keep is not None:
        sizes.add(whole - ahead - behind + x.shape[1] - route.now.keep.shape[1])
    return sizes - {0, 1}


def _dense_sizes(stop: Stop, x: Tensor, tokens: int) -> set[int]:
    return {tokens, tokens - sum(stop.route._ends), x.shape[1]} - {0, 1}


def _is_stream(t: Tensor, x: Tensor) -> bool:
    """Whether t may be other tokens, as a text is: (batch, tokens, features)."""
    return t.ndim == 3 and t.is_floating_point() and t.shape[0] == x.shape[0] and t.shape[1] > 1


def _known(block: Any) -> set[str]:
    """What the routes over a block name."""
    names: set[str] = set()
    for stop in block._routes:
        arguments = [stop.places.tokens, *(table.argument for table in stop.places.tables)]
        names |= {a.name if a.name is not None else str(a.position) for a in arguments if a is not None}
        names |= {table.path for table in stop.places.tables if table.path}
    return names


def is_ours(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(OURS)


def _title(stop: Stop, block: Any) -> str:
    return f"block {stop.route.place(block)} ({type(block).__name__})"


def _list(found: list[Suspect]) -> str:
    """One of each name, and how many more it holds."""
    names = dict.fromkeys(s.name for s in found)
    groups = [[s for s in found if s.name == name] for name in names]
    return "; ".join(f"{g[0]}" + (f" (and {len(g) - 1} more in it)" if len(g) > 1 else "") for g in groups)


def _beside(found: list[Suspect]) -> str:
    return ' (suffix="rest" where the tokens stand first)' if any(s.more for s in found) else ""


def _shown(where: Where) -> str:
    if isinstance(where, Entries):
        ends = [f", {name}={getattr(where, name)!r}" for name in ("prefix", "suffix") if getattr(where, name)]
        return f"Entries({where.dim}{''.join(ends)})".replace("'", '"')
    if isinstance(where, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(at)}" for key, at in where.items()) + "}"
    return repr(where)
