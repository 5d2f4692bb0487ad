"""The handle on a routed range of blocks, and what its blocks do with their tokens."""

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

    def __init__(self, route: Route, places: Places, first: bool, last: bool) -> None:
        self.route, self.places, self.first, self.last = route, places, first, last
        self.checked = False


class Route(RouteState):
    """What `route_blocks` returns: the handle on a routed range of blocks. All of it may be set between two forwards.

    Attributes:
        enabled: True; False makes the blocks dense until it is True again.
        probability: 1; the share of forwards that are routed, the others are dense. Drawn anew at every forward, alike
            on all ranks. Needs blocks that are eager or compiled in place (`block.compile()`).
        selection_ratio: share of the tokens that bypass the blocks, below 1; 0 is dense.
        keep: (batch, K) int32, the tokens kept in the last routed forward of this thread, prefix and suffix not
            counted; None before it. For REPA: `gather_tokens(target, route.keep)` are the targets of the features of a
            routed block.
        fixed: None, or (batch, K) integers to keep in place of a draw, unique in each row (K = all tokens in any order
            is allowed), with `shared` the same in every row: for sets of one's own making, such as `sample_keep` on
            global sample ids.
        force_keep: None, or (batch, N) bool, tokens that must go through (a masked loss, inpainting, padded text that
            stands ahead, `torch.arange(N) < lengths[:, None]`); they count among the K.
        score: None, or a function of the stream (batch, N, hidden) that gives (batch, N); the K largest are kept, in
            place of a draw: `lambda x: x.abs().sum(-1)`. No gradient.
        in_eval: False; True routes in evaluation mode too (self-guidance).
    """

    def __init__(
        self,
        start: int,
        end: int,
        blocks: list[nn.Module],
        selection_ratio: float,
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
        self.probability = 1.0
        self.selection_ratio = selection_ratio
        self._blocks = blocks

    @property
    def keep(self) -> Tensor | None:
        return self.now.keep

    @property
    def selection_ratio(self) -> float:
        return float(self._ratio)

    @selection_ratio.setter
    def selection_ratio(self, value: float) -> None:
        if not 0.0 <= value < 1.0:
            raise ValueError(
                "selection_ratio is the share of tokens that bypass the blocks: 0, which is dense, or it lies in "
                f"(0, 1), got {value}"
            )
        self._ratio = repr(float(value))  # torch.compile(dynamic=True) makes a symbol of a float, not of a string
        self._dense = value == 0

    @property
    def probability(self) -> float:
        return float(self._probability)

    @probability.setter
    def probability(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"probability is the share of forwards that are routed, 0 to 1, got {value}")
        self._probability = repr(float(value))
        self._phased = value < 1

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
        wanted = self.enabled and not self._dense and (self._blocks[0].training or self.in_eval)
        if not wanted or not self._phased:
            return wanted
        if torch.compiler.is_dynamo_compiling() and not self._here.now.outside:
            raise RuntimeError(
                f"route.probability={self.probability} is decided at every forward, which no single graph can: compile "
                "the blocks in place (block.compile()), or set route.enabled in the training loop"
            )
        return self.now.phase

    def verify(self, run: Callable[[], Tensor]) -> str:
        """Prove that the route is right: the model dense against all tokens routed in random order.

        Outputs, and gradients of the routed blocks' parameters and of what enters them, must be the same. What a wrong
        route does cannot hide: parameters that are zero (adaLN-zero) are random meanwhile, dropout is off, and every
        route over these blocks but this one. Use float32 or float64, and any small batch of at least 2 samples.

        Args:
            run: calls the model and returns a tensor that depends on all of its output, such as
                `lambda: model(x, t, y)`. Called several times with the same random numbers.

        Returns:
            A sentence that says what was compared, and how far apart it was.

        Raises:
            ValueError: the two differ. The message names the arguments and tensors that have an entry a token, and the
                call to write; if it says "tried", that call was proven right.
            RuntimeError: run gives other values each time, or no routed block ran.
        """
        from . import verify

        return verify.verify(self, run)

    def remove(self) -> None:
        """Make the blocks dense again for good; compile what was compiled with the route anew."""
        for block in self._blocks:
            stops = block.__dict__["_routes"]
            block.__dict__["_routes"] = tuple(stop for stop in stops if stop.route is not self)
            if not block._routes:
                if "_own_forward" not in vars(type(block)):
                    raise RuntimeError(f"{type(block).__name__} became another class after it was routed (fully_shard)")
                block.__class__ = type(block).__mro__[1]
                del block._routes
        self._blocks = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, Route)
        twin._blocks = copy.deepcopy(self._blocks, memo)
        return twin

    def __repr__(self) -> str:
        return f"Route(blocks {self.start} to {self.end}, selection_ratio={self.selection_ratio})"

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
                kept = kept_tokens(count, self.selection_ratio) if self.fixed is None else self.fixed.shape[1]
            fixed, force = (None, None) if self.order_only else (self.fixed, self.force_keep)
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


def _check_fixed(keep: Tensor, shared: bool) -> None:
    """Refuse what no set of tokens is; values are looked at where that waits for no device."""
    if keep.ndim != 2 or keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool:
        raise ValueError(f"route.fixed must be (batch, K) integers, got {keep.dtype} of shape {tuple(keep.shape)}")
    if keep.device.type == "cpu" and keep.numel():
        low, high = int(keep.min()), int(keep.max())
        if low < 0 or high >= 2**31:
            raise ValueError(f"route.fixed names tokens by number, 0 to 2^31 - 1, got {low if low < 0 else high}")
        if bool((keep.sort(dim=1).values.diff(dim=1) == 0).any()):
            raise ValueError("route.fixed names a token twice in a row: kept tokens are unique in a sample")
        if shared and bool((keep != keep[:1]).any()):
            raise ValueError("route.fixed has rows that differ, but shared=True keeps the same tokens in every sample")
