"""What routed blocks do with their tokens: into the first block, through those in the middle, out of the last."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import Argument, Table
from .entries import Span, describe, positions, tuple_like
from .reference import kept_tokens
from .state import RouteState, route_tokens
from .tokens import enter_route, exit_route


@dataclass
class Places:
    """Where blocks of one kind take and return what belongs to a route."""

    tokens: Argument
    tables: tuple[Table, ...]
    out: int | str | None
    prefix: int | str
    suffix: int | str


class Stop:
    """A block's place in a route."""

    def __init__(self, route: Passage, places: Places, first: bool, last: bool) -> None:
        self.route, self.places, self.first, self.last = route, places, first, last
        self.checked = False


class Passage(RouteState):
    """A routed range of blocks; its settings are documented in `Route`."""

    def __init__(
        self,
        start: int,
        end: int,
        blocks: list[nn.Module],
        shared: bool,
        score: Callable[[Tensor], Tensor] | None,
        ends: tuple[int, int],
    ) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.shared, self.score = shared, score
        self.watch: Callable[..., None] | None = None  # `verify` looks at calls through it
        self._ends = ends  # tokens ahead of and behind those that may be routed, at the first block
        self._fixed: Tensor | None = None
        self.force_keep: Tensor | None = None
        self.in_eval = False
        self.enabled = True
        self._ratio, self._dense = "0.5", False  # strings: torch.compile(dynamic=True) makes symbols of floats
        self._probability, self._phased = "1.0", False
        self._blocks = blocks

    @property
    def active(self) -> bool:
        """Whether a forward routes: the mode of the first routed block decides for all, so that what enters leaves."""
        wanted = self.enabled and not self._dense and (self._blocks[0].training or self.in_eval)
        if not wanted or not self._phased:
            return wanted
        if torch.compiler.is_dynamo_compiling() and not self._here.now.outside:
            raise RuntimeError(
                f"route.probability={self._probability} is decided at every forward, which no graph can: compile "
                "the blocks in place (block.compile()), or set route.enabled in the training loop"
            )
        return self.now.phase

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Passage)
        twin._blocks = copy.deepcopy(self._blocks, memo)
        return twin

    def place(self, block: nn.Module) -> int:
        """The block's index; for messages only: the compiler would make a graph of its own for every index."""
        return self.start + next(i for i, other in enumerate(self._blocks) if other is block)

    # --- a routed forward of a block: into it, and out of it ------------------------------------------------------

    def enter(self, stop: Stop, block: Any, twin: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any, Any]:
        """Block and arguments for the kept tokens, and what `leave` needs."""
        places = stop.places
        x = places.tokens.read(args, kwargs)
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise TypeError(
                f"{places.tokens} of block {self.place(block)} must be a (batch, tokens, hidden) tensor to be routed"
            )
        keep, byp = self._keep_for(stop, block, x)
        ahead, behind = self._ends
        count = byp.shape[1] - ahead - behind
        if stop.first:
            span = Span(count, ahead, behind)
            x, byp = enter_route(x, positions(keep, count, ahead, behind))
            self.hold(keep, byp)
        else:
            span = self._span(stop, block, x, keep.shape[1], count)
        args, kwargs = places.tokens.write(args, kwargs, x)
        for table in places.tables:
            twin, args, kwargs = table.routed(twin, args, kwargs, keep, span, self.shared)
        return twin, args, kwargs, (keep, byp, span, x)

    def leave(self, stop: Stop, block: Any, result: Any, entered: Any) -> Any:
        """The block's result, with all tokens behind the last block."""
        keep, byp, span, x = entered
        stream = pick(result, stop.places.out)
        if not isinstance(stream, Tensor) or stream.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"block {self.place(block)} ({type(block).__name__}) was given {tuple(x.shape[:2])} (batch, tokens) "
                f"and must keep them, got {describe(stream)}"
            )
        if not stop.last:
            return result
        self.hold(keep, byp.detach())  # a checkpoint that spans this block and later ones needs the values again
        return put(result, stop.places.out, self._joined(stream, byp, keep, span))

    def _keep_for(self, stop: Stop, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens of this forward, and x itself or what stands for it."""
        grad = torch.is_grad_enabled()
        if stop.first:
            ahead, behind = self._ends
            count = x.shape[1] - ahead - behind
            if self.order_only:
                kept = count
            else:
                kept = kept_tokens(count, float(self._ratio)) if self._fixed is None else self._fixed.shape[1]
            fixed, force = (None, None) if self.order_only else (self._fixed, self.force_keep)
            needed = x.requires_grad
            chosen = route_tokens(x.detach(), fixed, force, self.handle, count, kept, ahead, self.shared, grad, needed)
            return chosen, x
        now = self.now
        if now.keep is None or now.byp is None:
            raise RuntimeError(
                f"routed block {self.place(block)} ran without block {self.start}, where its route starts"
            )
        if not stop.places.tables and not stop.last:
            return now.keep, now.byp
        kept = now.keep.shape[1]
        chosen = route_tokens(x.detach(), now.keep, None, self.handle, 0, kept, 0, self.shared, grad, False)
        return chosen, now.byp

    def _span(self, stop: Stop, block: Any, x: Tensor, kept: int, count: int) -> Span:
        """How the stream stands at a block behind the first, where text may have been put beside the tokens."""
        ahead, behind = stop.places.prefix, stop.places.suffix
        if ahead == "rest":
            ahead = x.shape[1] - kept - int(behind)
        if behind == "rest":
            behind = x.shape[1] - kept - int(ahead)
        ahead, behind = int(ahead), int(behind)
        expected = ahead + kept + behind
        if ahead < 0 or behind < 0 or x.shape[1] != expected:
            raise ValueError(
                f"block {self.place(block)} was given {tuple(x.shape[:2])} (batch, tokens) inside a route that keeps "
                f"{(x.shape[0], kept + max(ahead, 0) + max(behind, 0))}: the model must not add or drop tokens between "
                "routed blocks"
            )
        return Span(count, ahead, behind)

    def _joined(self, stream: Tensor, byp: Tensor, keep: Tensor, span: Span) -> Tensor:
        """All tokens, where the last block put K into a stream with `span.prefix` ahead and `span.suffix` behind."""
        ahead, behind = self._ends
        if (ahead, behind) == (span.prefix, span.suffix):
            return exit_route(stream, byp, positions(keep, span.count, ahead, behind))
        kept = keep.shape[1]
        inner = stream[:, span.prefix : span.prefix + kept]
        whole = exit_route(inner, byp[:, ahead : ahead + span.count], keep)
        return torch.cat((stream[:, : span.prefix], whole, stream[:, span.prefix + kept :]), dim=1)


def pick(result: Any, out: int | str | None) -> Any:
    if out is None:
        if isinstance(result, (tuple, list, dict)):
            raise TypeError(f"the block returns {len(result)} values: say with out=… which of them is the tokens")
        return result
    if isinstance(result, dict) and out in result:
        return result[out]
    if isinstance(out, str) or not isinstance(result, (tuple, list)) or not -len(result) <= out < len(result):
        kind = "dict" if isinstance(out, str) else "tuple"
        raise TypeError(f"out={out!r} picks from a {kind}, the block returns {describe(result)}")
    return result[out]


def put(result: Any, out: int | str | None, stream: Tensor) -> Any:
    if out is None:
        return stream
    if isinstance(result, dict):
        changed = copy.copy(result)  # a ModelOutput stays one
        changed[out] = stream
        return changed
    values = list(result)
    values[int(out)] = stream
    return tuple_like(result, values)
