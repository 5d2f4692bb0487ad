"""Token routing for a model that knows nothing of it: `route = route_blocks(model.blocks, 1, 14, 0.5)`, one line.

Each routed block gets a subclass of its own class whose forward wraps the original: no parameter, buffer or module is
added or renamed, copies and compiled blocks work, and the model's own loop over its blocks stays as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Argument, Entries, describe, positions, take, tuple_like
from .reference import kept_tokens
from .state import RouteState, route_tokens
from .tokens import enter_route, exit_route

# --- public ------------------------------------------------------------------------------------------------------


class Route(RouteState):
    """What `route_blocks` returns: the handle on a routed range of blocks.

    Attributes:
        keep: (batch, K) int32, the tokens kept in the last routed forward, prefix not counted; None before it. For
            REPA: `gather_tokens(target, route.keep)` are the targets of the features of a routed block.
        fixed: None, or (batch, K) integers to keep in place of a draw, unique in each row (K = all tokens in any order
            is allowed), with `shared` the same in every row: for sets of one's own making, such as `sample_keep` on
            global sample ids.
        in_eval: False; True routes in evaluation mode too (self-guidance).
        selection_ratio: share of the tokens that bypass the blocks; may be set anew.
    """

    keep: Tensor | None
    in_eval: bool

    def __init__(
        self,
        start: int,
        end: int,
        blocks: list[nn.Module],
        selection_ratio: float,
        tokens: Argument,
        per_token: Sequence[tuple[Argument, Entries]],
        out: int | None,
        prefix: int,
        shared: bool,
    ) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.prefix, self.shared = prefix, shared
        self._fixed: Tensor | None = None
        self.in_eval = False
        self.selection_ratio = selection_ratio
        self._tokens, self._per_token, self._out = tokens, per_token, out
        self._blocks = blocks

    @property
    def selection_ratio(self) -> float:
        return float(self._ratio)

    @selection_ratio.setter
    def selection_ratio(self, value: float) -> None:
        kept_tokens(2, value)
        self._ratio = repr(value)  # torch.compile(dynamic=True) makes a symbol of a float, not of a string

    @property
    def fixed(self) -> Tensor | None:
        return self._fixed

    @fixed.setter
    def fixed(self, keep: Tensor | None) -> None:
        if keep is not None:
            _check_fixed(keep, self.shared)
        self._fixed = keep

    @property
    def active(self) -> bool:
        """Whether a forward routes: the mode of the first routed block decides for all, so that what enters leaves."""
        return self._blocks[0].training or self.in_eval

    def remove(self) -> None:
        """Make the blocks dense again for good; compile what was compiled with the route anew."""
        for block in self._blocks:
            block.__class__ = type(block).__mro__[1]
            for name in ("_route", "_route_index", "_route_ends"):
                delattr(block, name)
        self._blocks = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Route)
        twin._blocks = copy.deepcopy(self._blocks, memo)
        return twin

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
        rows = positions(keep, self.prefix)
        if first:
            x, byp = enter_route(x, rows)
            self.keep, self.byp = keep, byp
        elif x.shape[:2] != rows.shape:
            raise ValueError(
                f"block {block._route_index} was given {tuple(x.shape[:2])} (batch, tokens) inside a route that keeps "
                f"{tuple(rows.shape)}: the model must not add or drop tokens between routed blocks"
            )
        args, kwargs = self._tokens.write(args, kwargs, x)
        for argument, dim in self._per_token:
            table = argument.read(args, kwargs)
            if table is not None:
                routed = take(table, dim, keep, byp.shape[1] - self.prefix, self.shared, argument)
                args, kwargs = argument.write(args, kwargs, routed)
        result = forward(block, *args, **kwargs)
        stream = self._stream(result)
        if not isinstance(stream, Tensor) or stream.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"block {block._route_index} ({type(block).__name__}) was given {tuple(x.shape[:2])} (batch, tokens) "
                f"and must keep them, got {describe(stream)}"
            )
        if not last:
            return result
        self.byp = byp.detach()  # a checkpoint that spans this block and later ones needs the values again
        return self._with_stream(result, exit_route(stream, byp, rows))

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

    def _stream(self, result: Any) -> Any:
        if self._out is None:
            if isinstance(result, (tuple, list)):
                raise TypeError(f"the block returns {len(result)} values: say with out=… which of them is the tokens")
            return result
        if not isinstance(result, (tuple, list)) or not -len(result) <= self._out < len(result):
            raise TypeError(f"out={self._out} picks from a tuple, the block returns {describe(result)}")
        return result[self._out]

    def _with_stream(self, result: Any, stream: Tensor) -> Any:
        if self._out is None:
            return stream
        values = list(result)
        values[self._out] = stream
        return tuple_like(result, values)


def route_blocks(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    start: int,
    end: int,
    selection_ratio: float,
    *,
    tokens: int | str = 0,
    per_token: Mapping[int | str, Entries] | None = None,
    out: int | None = None,
    prefix: int = 0,
    shared: bool = False,
) -> Route:
    """Let a share of the tokens bypass `blocks[start]` to `blocks[end]`, the last included, while training.

    TREAD, https://arxiv.org/abs/2501.04765. Draws a fresh set every forward; `route.manual_seed` makes the sequence
    repeatable. The blocks are dense while the first of them is in evaluation mode, unless `route.in_eval` is set.
    Blocks may be compiled (before or after, with `fullgraph=True`), checkpointed one by one (`use_reentrant=False`),
    sharded, pickled and deep-copied. What Dynamo cannot put into one graph is a checkpoint *around* a routed block:
    compile the block inside of it, or without `fullgraph=True`. torch.func's transforms are not supported.

    Args:
        blocks: the model's list of blocks, which are changed in place.
        start: first routed block, 0-based.
        end: last routed block, itself routed.
        selection_ratio: share of the tokens that *bypass* the blocks, in (0, 1).
        tokens: position or name of the forward argument with the tokens, (batch, tokens, hidden).
        per_token: position or name of arguments with one entry a token (rotary tables, tuples of them, modules that
            hold them as buffers) -> dimension of the entries; of a square mask both, as a tuple; of a tuple of which
            only some values are tables, {position in it: dimension}. Entries ahead of the tokens' own (a prefix, a
            text in front) stay.
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
    members = [getattr(blocks[i], "_orig_mod", blocks[i]) for i in range(start, end + 1)]
    for index, block in enumerate(members, start):
        _check_block(block, index, members)
    places = [[Argument.find(b, name) for name in (tokens, *(per_token or {}))] for b in members]
    if any(found != places[0] for found in places):
        raise ValueError(f"blocks {start} to {end} take their arguments in different orders: pass names, not positions")
    tables = tuple(zip(places[0][1:], (per_token or {}).values(), strict=True))
    route = Route(start, end, members, selection_ratio, places[0][0], tables, out, prefix, shared)
    for index, block in enumerate(members, start):
        block.__class__ = _routed_class(type(block))  # type: ignore[arg-type]  # classes are hashable
        block._route, block._route_index = route, index
        block._route_ends = index == start, index == end
    return route


# --- blocks ----------------------------------------------------------------------------------------------------------


@functools.cache  # one class for all blocks of a base: the compiler's guards and graphs hold for all of them
def _routed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass with base's name, so that wrapping policies and `repr` see the block they know."""
    own_forward = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        route = self._route
        if not route.active:
            return own_forward(self, *args, **kwargs)
        return route.run(self, own_forward, args, kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        """As base's, by the name of base: this class has no place of its own."""
        reduced: Any = base.__reduce_ex__(self, protocol)
        return (_new_routed, (base, *reduced[1][1:]), *reduced[2:])

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"forward": forward, "__reduce_ex__": reduce, **names})


def _new_routed(base: type[nn.Module], *arguments: Any) -> nn.Module:
    """An unpickled block, before it has its state."""
    routed = _routed_class(base)  # type: ignore[arg-type]  # classes are hashable
    made: nn.Module = routed.__new__(routed, *arguments)
    return made


def _check_fixed(keep: Tensor, shared: bool) -> None:
    """Refuse what no set of tokens is; values are looked at where that waits for no device."""
    if keep.ndim != 2 or keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise ValueError(f"route.fixed must be (batch, K) integers, got {keep.dtype} of shape {tuple(keep.shape)}")
    if keep.device.type == "cpu" and keep.numel():
        if bool((keep.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("route.fixed names a token twice in a row: kept tokens are unique in a sample")
        if shared and bool((keep != keep[:1]).any()):
            raise ValueError("route.fixed has rows that differ, but shared=True keeps the same tokens in every sample")


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
