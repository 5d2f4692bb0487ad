"""Which tokens a routed forward keeps, and the same tokens again when activation checkpointing repeats it.

A block that runs again inside a backward must see what it saw in *its* forward, not in the last one. The op
`route_tokens` runs at every routed block, compiled or not, and knows a repeated block by its input: checkpointing hands
back the very tensor that it saved. A block whose input it cannot identify is an error, never a guess.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..launch import NAMESPACE
from .choice import choose, mix, signed
from .tokens import MAX_TOKENS

_handles = itertools.count()
_states: WeakValueDictionary[int, RouteState] = WeakValueDictionary()


class Now:
    """What a routed forward hands from its first block to its last.

    Attributes:
        keep, byp: kept tokens, and what stands for the whole stream.
        phase: whether this forward is routed, as `probability` has it.
        outside: whether a call is watched from outside of every compiled graph, see `around.py`.
        reentrant: whether the first block ran in a reentrant checkpoint, which records no gradients.
        forward: what checkpointing needs to know.
    """

    def __init__(self) -> None:
        self.keep: Tensor | None = None
        self.byp: Tensor | None = None
        self.phase = True
        self.outside = False
        self.reentrant = False
        self.forward: Repeatable | None = None


class _Here(threading.local):
    """A thread's own `Now`. CUDA's backward threads, which first come here in a backward, repeat the latest one."""

    def __init__(self) -> None:
        self.now = Now()
        self.repeats = torch._C._current_graph_task_id() != -1


class RouteState:
    """The mutable part of a `Route`: its seed, and what the last forward of each thread kept."""

    score: Callable[[Tensor], Tensor] | None

    def __init__(self) -> None:
        self.order_only = False  # `verify`: keep all tokens, in random order
        self.score = None
        self._seed: int | Tensor = 0
        self._phases = 0
        self._blank()
        self.manual_seed(torch.initial_seed() + self.handle)

    def _blank(self) -> None:
        self.handle = next(_handles)  # ops take integers: they find the state by it
        _states[self.handle] = self
        self._here, self._latest, self._lock = _Here(), Now(), threading.Lock()
        self._threads: set[int] = set()  # that ran forwards which a backward may repeat

    def manual_seed(self, seed: int) -> None:
        """Restart the sequence of kept sets. Ranks of one run draw different sets from one seed."""
        self._seed, self._phases = mix(seed), mix(seed)

    @property
    def now(self) -> Now:
        return self._latest if self._here.repeats else self._here.now

    def hold(self, keep: Tensor, byp: Tensor) -> None:
        """Hand on to the blocks behind, of this thread, and to the backward threads that repeat its forward."""
        for now in (self._here.now, self._latest):
            now.keep, now.byp = keep, byp

    def forget(self) -> None:
        """Let go of a forward that failed: its graph must not stay alive."""
        for now in (self._here.now, self._latest):
            now.byp = now.forward = None

    def phase(self, routed: bool) -> None:
        for now in (self._here.now, self._latest):
            now.phase = routed

    def next_phase(self, probability: float) -> bool:
        """Whether the next forward is routed. Ranks of one run agree: one dense rank would keep the others waiting."""
        with self._lock:
            self._phases = mix(self._phases)
            return self._phases < probability * 2**64

    def draw(self, x: Tensor, force: Tensor | None, tokens: int, kept: int, first: int, shared: bool) -> Tensor:
        """(batch, kept) int32, a fresh set every call; the seed counts on the device, so that CUDA graphs replay it."""
        if tokens > MAX_TOKENS and self.score is None:
            raise ValueError(f"a route draws from at most {MAX_TOKENS} tokens, got {tokens}: set route.fixed")
        with self._lock:
            if not isinstance(self._seed, Tensor) or self._seed.device != x.device:
                value = signed(int(self._seed) + _rank_offset())
                with torch.inference_mode(False):  # a tensor from within could not count outside
                    self._seed = torch.tensor(value, dtype=torch.int64, device=x.device)
            score = None if self.score is None or self.order_only else self.score(x[:, first : first + tokens])
            keep = choose(
                x, self._seed, tokens, kept, force=force, score=score, shared=shared, ordered=not self.order_only
            )
            self._seed.add_(1)
        return keep

    def __getstate__(self) -> dict[str, Any]:
        own = ("handle", "_here", "_latest", "_lock", "_threads")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._blank()

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteState:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._seed = self._seed.clone() if isinstance(self._seed, Tensor) else self._seed
        return twin


def routes() -> list[RouteState]:
    """All that live."""
    return list(_states.values())


class Repeatable:
    """A forward: its tokens, and the inputs of its blocks by storage, held weakly."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.inputs: dict[int, tuple[StorageWeakRef, bool]] = {}
        self.repeated: set[int] = set()
        # The storage that the first block was given in two forwards, the earlier of which may still be repeated.
        self.ambiguous: int | None = None
        self.bypass_gradient: Tensor | None = None  # from the last block to the first of a reentrant checkpoint

    def note(self, x: Tensor, grad: bool) -> None:
        storage = x.untyped_storage()
        self.inputs[storage._cdata] = StorageWeakRef(storage), grad  # type: ignore[no-untyped-call]

    def knows(self, x: Tensor) -> bool:
        """Whether x was an input in this forward. It must have lived since, else its address may be another's."""
        storage = x.untyped_storage()._cdata
        alive = storage in self.inputs and not self.inputs[storage][0].expired()  # type: ignore[no-untyped-call]
        return alive and storage != self.ambiguous

    def note_gradient(self, grad: Tensor) -> None:
        """The gradient of the bypassed tokens, for the first block of a reentrant checkpoint."""
        self.bypass_gradient = grad

    def recorded_gradients(self, x: Tensor) -> bool:
        return self.inputs.get(x.untyped_storage()._cdata, (None, True))[1]


# No argument of the op differs between two blocks in the middle of a route: one compiled graph serves them all.
@torch.library.custom_op(f"{NAMESPACE}::route_tokens", mutates_args=())
def route_tokens(
    x: Tensor,
    keep: Tensor | None,
    force: Tensor | None,
    handle: int,
    tokens: int,
    kept: int,
    first: int,
    shared: bool,
    grad: bool,
    needed: bool,
) -> Tensor:
    """The kept tokens of the forward that a block with input x belongs to, (batch, kept) int32.

    Args:
        x: the block's input, without history.
        keep: the set as far as it is known: fixed by the user, or, behind the first block, that of the last forward.
        force: (batch, N) bool, tokens that must be kept.
        handle: of the `RouteState`.
        tokens: N without prefix and suffix, at the first block; 0 behind it.
        kept: K.
        first: the prefix.
        shared: draw one set for the batch.
        grad: whether gradients are recorded.
        needed: whether the block's input has one: without records, the mark of a reentrant checkpoint.
    """
    state = _states[handle]
    if torch._C._current_graph_task_id() != -1:  # inside a backward: a repetition
        return _repeat(state, x, grad).clone()
    if tokens:
        keep = _begin(state, keep, force, x, tokens, kept, first, shared, grad or needed)
    assert keep is not None
    now = state._here.now
    if now.forward is not None:
        now.forward.note(x, grad)
    return keep.clone()


@route_tokens.register_fake
def _(
    x: Tensor,
    keep: Tensor | None,
    force: Tensor | None,
    handle: int,
    tokens: int,
    kept: int,
    first: int,
    shared: bool,
    grad: bool,
    needed: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], kept), dtype=torch.int32)


def _begin(
    state: RouteState,
    fixed: Tensor | None,
    force: Tensor | None,
    x: Tensor,
    tokens: int,
    kept: int,
    first: int,
    shared: bool,
    repeatable: bool,
) -> Tensor:
    if fixed is not None:
        if fixed.ndim != 2 or fixed.shape[0] != x.shape[0] or not 0 < kept <= tokens:
            raise ValueError(
                f"route.fixed must be (batch, K) for a batch of {x.shape[0]} and {tokens} tokens, "
                f"got {tuple(fixed.shape)}"
            )
        if force is not None:
            raise ValueError("route.fixed names the kept tokens one by one: set route.force_keep to None beside it")
        # A number that 32 bits do not hold stays outside of the tokens, where it is noticed.
        keep = fixed.to(x.device).clamp(-1, 2**31 - 1).to(torch.int32)
    else:
        keep = state.draw(x, force, tokens, kept, first, shared)
    here = state._here.now
    last, forward = here.forward, Repeatable(keep)
    here.forward = state._latest.forward = forward
    if repeatable:
        state._threads.add(threading.get_ident())
    storage = x.untyped_storage()._cdata
    if last is not None and last.knows(x) and repeatable and storage not in last.repeated:
        forward.ambiguous = storage
    return keep


def _repeat(state: RouteState, x: Tensor, grad: bool) -> Tensor:
    now = state.now
    forward = now.forward
    # Checkpointing repeats a whole region while one node waits for its tensors: behind an identified block in that
    # region, the others are of the same forward though their inputs are new.
    node: Any = torch._C._current_autograd_node()
    key = f"{NAMESPACE}::route {state.handle}"
    seen = node.metadata.get(key) if node is not None else None
    if forward is not None and grad and not forward.recorded_gradients(x) and not state._here.now.outside:
        raise RuntimeError(
            "a reentrant checkpoint repeats a routed block inside a compiled graph: pass use_reentrant=False where the "
            "model calls torch.utils.checkpoint.checkpoint, or compile with block.compile() in place"
        )
    if now is state._latest and len(state._threads) > 1:
        raise RuntimeError(
            "a routed block is recomputed in one of CUDA's backward threads and was trained by several threads: its "
            "tokens cannot be known, give each thread a copy of the model (copy.deepcopy)"
        )
    if forward is None or not (forward.knows(x) or seen is forward):
        raise RuntimeError(
            "a routed block is recomputed in a backward and its tokens cannot be known: either another routed forward "
            "ran since its own (call backward before the next forward), or one checkpoint spans blocks from before "
            "the route (checkpoint each block by itself), or its saved input was moved (offloading)"
        )
    forward.repeated.add(x.untyped_storage()._cdata)
    if node is not None:
        node.metadata[key] = forward
    return forward.keep


def _rank_offset() -> int:
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() << 40 if initialised else 0  # 2^40 forwards lie between two ranks
