"""Token routing for a model that knows nothing of it: `route = route_blocks(model.blocks, 1, 14, 0.5)`, one line.

Each routed block gets a subclass of its own class whose forward wraps the original: no parameter, buffer or module is
added or renamed, copies and compiled blocks work, and the model's own loop over its blocks stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .reference import kept_tokens
from .route_state import RouteState, route_tokens
from .token_routing import enter_route, exit_route, gather_tokens

# --- public ------------------------------------------------------------------------------------------------------


class Route(RouteState):
    """What `route_blocks` returns: the handle on a routed range of blocks.

    Attributes:
        keep: (batch, K) int32, the tokens kept in the last routed forward, prefix not counted; None before it. For
            REPA: `gather_tokens(target, route.keep)` are the targets of the features of a routed block.
        fixed: None, or (batch, K) integers to keep in place of a draw (K = all tokens in any order is allowed): for
            sets of one's own making, such as `sample_keep` on global sample ids.
        in_eval: False; True routes in evaluation mode too (self-guidance).
    """

    keep: Tensor | None
    fixed: Tensor | None
    in_eval: bool

    def __init__(
        self,
        start: int,
        end: int,
        selection_ratio: float,
        tokens: Argument,
        per_token: Sequence[tuple[Argument, int]],
        out: int | None,
        prefix: int,
        shared: bool,
    ) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.prefix, self.shared = prefix, shared
        self.fixed, self.in_eval = None, False
        self._ratio = repr(selection_ratio)  # torch.compile(dynamic=True) makes a symbol of a float, not of a string
        self._tokens, self._per_token, self._out = tokens, per_token, out

    @property
    def selection_ratio(self) -> float:
        return float(self._ratio)

    def __repr__(self) -> str:
        return f"Route(blocks {self.start} to {self.end}, selection_ratio={self.selection_ratio})"

    def run(self, block: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The routed forward of a block, around its own `forward`. Its index is read for messages only: the compiler
        would make a graph of its own for every index."""
        first, last = block._route_ends
        x = self._tokens.read(args, kwargs)
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise TypeError(
                f"{self._tokens} of block {block._route_index} must be a (batch, tokens, hidden) tensor to be routed"
            )
        keep, byp = self._keep_for(block, x, first, last)
        positions = self._positions(keep, self.prefix)
        if first:
            x, byp = enter_route(x, positions)
            self.keep, self.byp = keep, byp
        elif x.shape[:2] != positions.shape:
            raise ValueError(
                f"block {block._route_index} was given {tuple(x.shape[:2])} (batch, tokens) inside a route that keeps "
                f"{tuple(positions.shape)}: the model must not add or drop tokens between routed blocks"
            )
        args, kwargs = self._tokens.write(args, kwargs, x)
        for argument, dim in self._per_token:
            table = argument.read(args, kwargs)
            if table is not None:
                routed = self._take(table, dim, keep, byp.shape[1] - self.prefix, argument)
                args, kwargs = argument.write(args, kwargs, routed)
        result = forward(block, *args, **kwargs)
        stream = self._stream(result)
        if not isinstance(stream, Tensor) or stream.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"block {block._route_index} ({type(block).__name__}) was given {tuple(x.shape[:2])} (batch, tokens) "
                f"and must keep them, got {_describe(stream)}"
            )
        if not last:
            return result
        self.byp = byp.detach()  # a checkpoint that spans this block and later ones needs the values again
        return self._with_stream(result, exit_route(stream, byp, positions))

    def _keep_for(self, block: Any, x: Tensor, first: bool, last: bool) -> tuple[Tensor, Tensor]:
        """The kept tokens of this forward, and x itself or what stands for it."""
        if first:
            count = x.shape[1] - self.prefix
            kept = kept_tokens(count, self.selection_ratio) if self.fixed is None else self.fixed.shape[1]
            grad = torch.is_grad_enabled()
            return route_tokens(x.detach(), self.fixed, self.handle, count, kept, self.shared, grad), x
        if self.keep is None or self.byp is None:
            raise RuntimeError(
                f"routed block {block._route_index} ran without block {self.start}, where its route starts"
            )
        if not self._per_token and not last:
            return self.keep, self.byp
        grad = torch.is_grad_enabled()
        kept = self.keep.shape[1]
        return route_tokens(x.detach(), self.keep, self.handle, 0, kept, self.shared, grad), self.byp

    def _positions(self, keep: Tensor, ahead: int) -> Tensor:
        """`keep` behind `ahead` tokens that are never routed."""
        if ahead == 0:
            return keep
        first = torch.arange(ahead, dtype=keep.dtype, device=keep.device).expand(keep.shape[0], ahead)
        return torch.cat((first, keep + ahead), dim=1)

    def _take(self, table: Any, dim: int, keep: Tensor, count: int, argument: Argument) -> Any:
        """The entries of the kept tokens in a per-token argument, which may be a tuple of tables."""
        if isinstance(table, (tuple, list)):
            return type(table)(self._take(entry, dim, keep, count, argument) for entry in table)
        if isinstance(table, nn.Module):  # a callable rotary embedding (EVA, JiT, LightningDiT) keeps tables as buffers
            taken = {n: self._take(b, dim, keep, count, argument) for n, b in table.named_buffers() if b.ndim}
            return RoutedTable(table, taken)
        if not isinstance(table, Tensor):
            raise TypeError(f"{argument} must be a tensor, a tuple of them or a module with buffers, to be routed")
        ahead = table.shape[dim] - count
        if ahead < 0:
            raise ValueError(f"{argument} has {table.shape[dim]} entries in dimension {dim} for {count} tokens")
        positions = self._positions(keep, ahead)
        if self.shared:
            return table.index_select(dim, positions[0])
        batch = keep.shape[0]
        if dim % table.ndim == 0 or table.shape[0] not in (1, batch):
            raise ValueError(
                f"{argument} of shape {tuple(table.shape)} is one table for the whole batch of {batch}: "
                "pass shared=True to keep the same tokens in every sample"
            )
        rows = table.expand(batch, *table.shape[1:]).movedim(dim, 1)
        return gather_tokens(rows, positions).movedim(1, dim)

    def _stream(self, result: Any) -> Any:
        if self._out is None:
            if isinstance(result, (tuple, list)):
                raise TypeError(f"the block returns {len(result)} values: say with out=… which of them is the tokens")
            return result
        if not isinstance(result, (tuple, list)) or not -len(result) <= self._out < len(result):
            raise TypeError(f"out={self._out} picks from a tuple, the block returns {_describe(result)}")
        return result[self._out]

    def _with_stream(self, result: Any, stream: Tensor) -> Any:
        if self._out is None:
            return stream
        values = list(result)
        values[self._out] = stream
        return type(result)(values)


def route_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    start: int,
    end: int,
    selection_ratio: float,
    *,
    tokens: int | str = 0,
    per_token: Mapping[int | str, int] | None = None,
    out: int | None = None,
    prefix: int = 0,
    shared: bool = False,
) -> Route:
    """Let a share of the tokens bypass `blocks[start]` to `blocks[end]`, the last included, while training.

    TREAD, https://arxiv.org/abs/2501.04765. Draws a fresh set every forward; `route.manual_seed` makes the sequence
    repeatable. In evaluation mode the blocks are dense unless `route.in_eval` is set. Blocks may be compiled (before
    or after, with `fullgraph=True`), checkpointed one by one (`use_reentrant=False`), sharded and deep-copied.

    Args:
        blocks: the model's list of blocks, which are changed in place.
        start, end: first and last routed block, 0-based.
        selection_ratio: share of the tokens that *bypass* the blocks, in (0, 1).
        tokens: position or name of the forward argument with the tokens, (batch, tokens, hidden).
        per_token: position or name of arguments with one entry a token (rotary tables, tuples of them, modules that
            hold them as buffers) -> dimension of the entries. Entries ahead of the tokens' own (a prefix, a text in
            front) stay.
        out: which value of a tuple that the block returns is the tokens.
        prefix: leading tokens that are never routed.
        shared: keep the same tokens in every sample, as a table without a batch dimension asks for.

    Returns:
        A `Route`.

    Raises:
        ValueError: a range that is empty or outside the blocks, a ratio outside (0, 1), an argument that the blocks
            do not have, a block that mixes neighbours on a grid, or one that is routed already. When run: a block
            that does not keep the token count, or a table that does not fit.
        RuntimeError: when run, activation checkpointing that cannot know which tokens the forward kept.
    """
    if not 0 <= start < len(blocks) or not 0 <= end < len(blocks):
        raise ValueError(f"start {start} and end {end} must lie in the {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    if start > end:
        raise ValueError(f"the route starts at block {start}, after it ends at block {end}")
    if prefix < 0:
        raise ValueError(f"prefix is a number of tokens, got {prefix}")
    kept_tokens(2, selection_ratio)
    members = [getattr(blocks[i], "_orig_mod", blocks[i]) for i in range(start, end + 1)]
    for index, block in enumerate(members, start):
        _check_block(block, index, members)
    places = [[Argument.find(b, name) for name in (tokens, *(per_token or {}))] for b in members]
    if any(found != places[0] for found in places):
        raise ValueError(f"blocks {start} to {end} take their arguments in different orders: pass names, not positions")
    tables = tuple(zip(places[0][1:], (per_token or {}).values(), strict=True))
    route = Route(start, end, selection_ratio, places[0][0], tables, out, prefix, shared)
    for index, block in enumerate(members, start):
        block.__class__ = _routed_class(type(block))  # type: ignore[arg-type]  # classes are hashable
        block._route, block._route_index = route, index
        block._route_ends = index == start, index == end
    return route


# --- blocks ------------------------------------------------------------------------------------------------------


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


@functools.cache  # one class for all blocks of a base: the compiler's guards and graphs hold for all of them
def _routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass with base's name, so that wrapping policies and `repr` see the block they know."""
    own_forward = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        route = self._route
        if not (self.training or route.in_eval):
            return own_forward(self, *args, **kwargs)
        return route.run(self, own_forward, args, kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"forward": forward, **names})


_POOLING = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.Fold, nn.Unfold)


def _check_block(block: nn.Module, index: int, members: list[nn.Module]) -> None:
    what = f"block {index} ({type(block).__name__})"
    if "_route" in block.__dict__:
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


def _describe(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    return f"{len(result)} values" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"
