"""Which tokens a routed forward keeps, and the same tokens again when activation checkpointing repeats it.

A block that runs again inside a backward must see what it saw in *its* forward, not in the last one. The op
`route_tokens` runs at every routed block, compiled or not, and knows a repeated block by its input: checkpointing hands
back the very tensor that it saved. A block whose input it cannot identify is an error, never a guess.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..launch import NAMESPACE
from .tokens import MAX_TOKENS, draw

_handles = itertools.count()
_states: WeakValueDictionary[int, RouteState] = WeakValueDictionary()


class RouteState:
    """The mutable part of a `Route`: its seed, and what the last forward kept."""

    def __init__(self) -> None:
        self.handle = next(_handles)  # ops take integers: they find the state by it
        _states[self.handle] = self
        self.keep: Tensor | None = None
        self.byp: Tensor | None = None
        self._seed: int | Tensor = _mix(torch.initial_seed() + self.handle)
        self._forward: _Forward | None = None

    def manual_seed(self, seed: int) -> None:
        """Restart the sequence of kept sets. Ranks of one run draw different sets from one seed."""
        self._seed = _mix(seed)

    def draw(self, batch: int, tokens: int, kept: int, device: torch.device) -> Tensor:
        """(batch, kept) int32, a fresh set every call; the seed counts on the device, so that CUDA graphs replay it."""
        if tokens > MAX_TOKENS:
            raise ValueError(f"a route draws from at most {MAX_TOKENS} tokens, got {tokens}: set route.fixed")
        if not isinstance(self._seed, Tensor) or self._seed.device != device:
            value = _signed(int(self._seed) + _rank_offset())
            with torch.inference_mode(False):  # a tensor from within could not count outside
                self._seed = torch.tensor(value, dtype=torch.int64, device=device)
        keep = draw(torch.arange(batch, device=device), self._seed, tokens, kept)
        self._seed.add_(1)
        return keep

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None, "keep": None, "byp": None, "_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.handle = next(_handles)
        _states[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteState:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.handle = next(_handles)
        _states[twin.handle] = twin
        twin._seed = self._seed.clone() if isinstance(self._seed, Tensor) else self._seed
        twin.byp = twin._forward = None
        return twin


class _Forward:
    """The last forward: its tokens, and the inputs of its blocks by storage, held weakly."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self.inputs: dict[int, tuple[StorageWeakRef, bool]] = {}
        self.repeated: set[int] = set()
        # The storage that the first block was given in two forwards, the earlier of which may still be repeated.
        self.ambiguous: int | None = None

    def note(self, x: Tensor, grad: bool) -> None:
        storage = x.untyped_storage()
        self.inputs[storage._cdata] = StorageWeakRef(storage), grad  # type: ignore[no-untyped-call]

    def knows(self, x: Tensor) -> bool:
        """Whether x was an input in this forward. It must have lived since, else its address may be another's."""
        storage = x.untyped_storage()._cdata
        alive = storage in self.inputs and not self.inputs[storage][0].expired()  # type: ignore[no-untyped-call]
        return alive and storage != self.ambiguous

    def recorded_gradients(self, x: Tensor) -> bool:
        return self.inputs.get(x.untyped_storage()._cdata, (None, True))[1]


# No argument of the op differs between two blocks in the middle of a route: one compiled graph serves them all.
@torch.library.custom_op(f"{NAMESPACE}::route_tokens", mutates_args=())
def route_tokens(
    x: Tensor, keep: Tensor | None, handle: int, tokens: int, kept: int, shared: bool, grad: bool
) -> Tensor:
    """The kept tokens of the forward that a block with input x belongs to, (batch, kept) int32.

    Args:
        x: the block's input, without history.
        keep: the set as far as it is known: fixed by the user, or, behind the first block, that of the last forward.
        handle: of the `RouteState`.
        tokens: N without prefix, at the first block; 0 behind it.
        kept: K.
        shared: draw one set for the batch.
        grad: whether gradients are recorded.
    """
    state = _states[handle]
    if torch._C._current_graph_task_id() != -1:  # inside a backward: a repetition
        return _repeat(state, x, grad).clone()
    if tokens:
        keep = _begin(state, keep, x, tokens, kept, shared)
    assert keep is not None
    if state._forward is not None:
        state._forward.note(x, grad)
    return keep.clone()


@route_tokens.register_fake
def _(x: Tensor, keep: Tensor | None, handle: int, tokens: int, kept: int, shared: bool, grad: bool) -> Tensor:
    return x.new_empty((x.shape[0], kept), dtype=torch.int32)


def _begin(state: RouteState, fixed: Tensor | None, x: Tensor, tokens: int, kept: int, shared: bool) -> Tensor:
    if fixed is not None:
        if fixed.ndim != 2 or fixed.shape[0] != x.shape[0] or not 0 < kept <= tokens:
            raise ValueError(
                f"route.fixed must be (batch, K) for a batch of {x.shape[0]} and {tokens} tokens, "
                f"got {tuple(fixed.shape)}"
            )
        keep = fixed.to(device=x.device, dtype=torch.int32)
    else:
        keep = state.draw(1 if shared else x.shape[0], tokens, kept, x.device).expand(x.shape[0], kept)
    last, state._forward = state._forward, _Forward(keep)
    storage = x.untyped_storage()._cdata
    if last is not None and last.knows(x) and last.recorded_gradients(x) and storage not in last.repeated:
        state._forward.ambiguous = storage
    return keep


def _repeat(state: RouteState, x: Tensor, grad: bool) -> Tensor:
    forward = state._forward
    # Checkpointing repeats a whole region while one node waits for its tensors: behind an identified block in that
    # region, the others are of the same forward though their inputs are new.
    node: Any = torch._C._current_autograd_node()
    key = f"{NAMESPACE}::route {state.handle}"
    seen = node.metadata.get(key) if node is not None else None
    if forward is not None and grad and not forward.recorded_gradients(x):
        raise RuntimeError("routed blocks need activation checkpointing with use_reentrant=False")
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


def _mix(seed: int) -> int:
    """splitmix64 (Steele et al., OOPSLA 2014): seeds 0, 1, 2 … give sequences that do not overlap in practice."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
