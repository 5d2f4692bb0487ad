"""Token routing for a model that knows nothing of it: `route = route_blocks(model.blocks, 1, 14, 0.5)`, one line.

Each routed block gets a subclass of its own class whose forward wraps the original: no parameter, buffer or module is
added or renamed, copies and compiled blocks work, and the model's own loop over its blocks stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Argument, Table
from .around import around
from .entries import Where
from .handle import Route
from .passage import Places, Stop

# --- public ------------------------------------------------------------------------------------------------------


def route_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    start: int,
    end: int,
    selection_ratio: float,
    *,
    tokens: int | str | tuple[int | str, ...] = 0,
    per_token: Mapping[int | str, Where] | None = None,
    out: int | str | tuple[int | str | None, ...] | None = None,
    prefix: int | str | tuple[int | str, ...] = 0,
    suffix: int | str | tuple[int | str, ...] = 0,
    shared: bool = False,
    score: Callable[[Tensor], Tensor] | None = None,
) -> Route:
    """Let a share of the tokens bypass `blocks[start]` to `blocks[end]`, the last included, while training.

    TREAD, https://arxiv.org/abs/2501.04765. Draws a fresh set every forward; `route.manual_seed` makes the sequence
    repeatable. The blocks are dense while the first of them is in evaluation mode, unless `route.in_eval` is set.
    Blocks may be compiled (before or after, with `fullgraph=True`), checkpointed one by one, sharded, pickled,
    deep-copied, and used by several threads. What Dynamo cannot put into one graph is a checkpoint *around* a routed
    block: compile the block, checkpoint from outside. Reentrant checkpoints work eagerly and where blocks are compiled
    in place; then the first routed block is checkpointed if the last one is.

    At the first routed forward an argument, or a tensor of the block, that seems to have an entry a token and is not
    named is an error, as is a failure inside of a block: both say what to write. `route.verify` proves the route.

    Several routes may lead over the same blocks, each for a stream of its own (`tokens`); entries of both in one table
    are taken in the order in which the routes were made. Blocks of two kinds, as where text joins the stream between
    them, are one route: `tokens`, `out`, `prefix` and `suffix` are then tuples, and a block is of the first kind whose
    `tokens` it has.

    Args:
        blocks: the model's blocks, which are changed in place; several lists may be put together.
        start: first routed block, 0-based, from the end where negative.
        end: last routed block, itself routed; from the end where negative.
        selection_ratio: share of the tokens that *bypass* the blocks, in [0, 1); 0 is dense.
        tokens: position or name of the forward argument with the tokens, (batch, tokens, hidden).
        per_token: position or name of arguments with one entry a token (rotary tables, tuples of them, modules that
            hold them in any way), or the path of a tensor or module that the block keeps ("attn.rope") -> dimension
            of the entries; of a square mask both, as a tuple; `Entries` where others stand beside them; of a tuple or
            dict of which only some values are tables, {position or key: dimension}; None where it only seems so.
        out: which value of a tuple or dict that the block returns is the tokens.
        prefix, suffix: tokens at the front and at the back that are never routed; behind the first block also "rest",
            as many as there are more. A number for each sample: `route.force_keep`.
        shared: keep the same tokens in every sample, as a table without a batch dimension asks for.
        score: keep the largest by this function of the tokens instead of a random set, see `Route`.

    Returns:
        A `Route`.

    Raises:
        ValueError: a range that is empty or outside the blocks, a ratio outside [0, 1), an argument that the blocks
            do not have, a block that mixes neighbours on a grid, or one that is routed already. When run: a block
            that does not keep the token count, a table that does not fit, or one that is not named.
        RuntimeError: when run, activation checkpointing that cannot know which tokens the forward kept.
    """
    count = len(blocks)
    if not -count <= start < count or not -count <= end < count:
        raise ValueError(f"start {start} and end {end} must lie in the {count} blocks, 0 to {count - 1}")
    start, end = start % count, end % count
    if start > end:
        raise ValueError(f"the route starts at block {start}, after it ends at block {end}")
    kinds = _kinds(tokens, out, prefix, suffix)
    members = [getattr(blocks[i], "_orig_mod", blocks[i]) for i in range(start, end + 1)]
    places = [_places(block, kinds, per_token or {}) for block in members]
    for index, (block, at) in enumerate(zip(members, places, strict=True), start):
        _check_block(block, index, members, at)
    if len(kinds) == 1 and any(at.tokens != places[0].tokens for at in places):
        raise ValueError(f"blocks {start} to {end} take their arguments in different orders: pass names, not positions")
    if "rest" in (places[0].prefix, places[0].suffix):
        raise ValueError(f'prefix and suffix of block {start}, where the route starts, are numbers, got "rest"')
    ends = int(places[0].prefix), int(places[0].suffix)
    route = Route(start, end, members, selection_ratio, shared, score, ends)
    for index, (block, at) in enumerate(zip(members, places, strict=True), start):
        if "_routes" not in block.__dict__:
            block.__class__ = _routed_class(type(block))  # type: ignore[arg-type]  # classes are hashable
            block.__dict__["_routes"] = ()
        block.__dict__["_routes"] += (Stop(route, at, index == start, index == end),)
    return route


# --- blocks ----------------------------------------------------------------------------------------------------------


@functools.cache  # one class for all blocks of a base: the compiler's guards and graphs hold for all of them
def _routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass with base's name, so that wrapping policies and `repr` see the block they know."""
    own = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered, twin = [], self
        for stop in self._routes:
            if stop.route.active:
                twin, args, kwargs, inside = stop.route.enter(stop, self, twin, args, kwargs)
                entered.append((stop, inside))
        result = own(twin, *args, **kwargs)
        for stop, inside in reversed(entered):
            result = stop.route.leave(stop, self, result, inside)
        return result

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return base.__call__(self, *args, **kwargs)
        return around(self, base.__call__, args, kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        """As base's, by the name of base: this class has no place of its own."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        return (_new_routed, (base, *reduced[1][1:]), *reduced[2:])

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {"forward": forward, "__call__": call, "__reduce_ex__": reduce, "_own_forward": staticmethod(own)}
    return type(base.__name__, (base,), {**methods, **names})


def _new_routed(base: type[nn.Module], *arguments: Any) -> nn.Module:
    """An unpickled block, before it has its state."""
    routed = _routed_class(base)  # type: ignore[arg-type]  # classes are hashable
    made: nn.Module = routed.__new__(routed, *arguments)
    return made


# --- checks when routing ---------------------------------------------------------------------------------------------

Kind = tuple[Any, Any, Any, Any]  # tokens, out, prefix, suffix


def _kinds(tokens: Any, out: Any, prefix: Any, suffix: Any) -> list[Kind]:
    """One for each kind of block."""
    given = (tokens, out, prefix, suffix)
    number = len(tokens) if isinstance(tokens, tuple) else 1
    for name, value in zip(("tokens", "out", "prefix", "suffix"), given, strict=True):
        if isinstance(value, tuple) and len(value) != number:
            raise ValueError(
                f"{name} must have an entry for each of {number} kinds of block, as tokens has, got {value}"
            )
    kinds = [tuple(v[i] if isinstance(v, tuple) else v for v in given) for i in range(number)]
    for _, _, *ends in kinds:
        for name, value in zip(("prefix", "suffix"), ends, strict=True):
            if value != "rest" and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is a number of tokens, got {value}")
        if ends[0] == ends[1] == "rest":
            raise ValueError('only one of prefix and suffix can be the "rest"')
    return kinds


def _places(block: nn.Module, kinds: list[Kind], per_token: Mapping[int | str, Where]) -> Places:
    several = len(kinds) > 1
    for name, out, prefix, suffix in kinds:
        found = Argument.look_for(block, name) if several else Argument.find(block, name)
        if found is not None:
            tables = tuple(Table.find(block, which, where) for which, where in per_token.items())
            return Places(found, tables, out, prefix, suffix)
    wanted = ", ".join(repr(kind[0]) for kind in kinds)
    raise ValueError(f"{type(block).__name__} has none of the arguments {wanted}")


_POOLING = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.Fold, nn.Unfold)


def _check_block(block: nn.Module, index: int, members: list[nn.Module], places: Places) -> None:
    what = f"block {index} ({type(block).__name__})"
    if any(stop.places.tokens == places.tokens for stop in getattr(block, "_routes", ())):
        raise ValueError(f"{what} is routed already")
    if sum(block is other for other in members) > 1:
        raise ValueError(f"{what} stands more than once in the range: one module cannot be two places of a route")
    if "forward" in block.__dict__:
        raise ValueError(f"{what} has a forward of its own set on the instance: route the blocks before that is done")
    for name, module in block.named_modules():
        mixes = isinstance(module, nn.modules.conv._ConvNd) and any(k > 1 for k in module.kernel_size)
        if mixes or isinstance(module, _POOLING):
            raise ValueError(
                f"{what} mixes neighbours on the token grid in {name or 'itself'} ({module}), which a subset of the "
                "tokens does not have: such blocks cannot be routed"
            )
