"""What surrounds the call of a routed block and cannot stand in a graph: phases, checks, reentrant checkpoints.

A block that is compiled in place is called from here too. Where one graph is made of the whole model, none of this
runs: there phases and reentrant checkpoints are refused, and `route.verify` does what the checks do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .passage import Stop, pick, put
from .state import Repeatable
from .suspects import explain, look


def around(block: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`call(block, *args, **kwargs)`, watched."""
    stops: tuple[Stop, ...] = block._routes
    repeated = torch._C._current_graph_task_id() != -1
    for stop in stops:
        route = stop.route
        route._here.now.outside = True
        if route._phased and stop.first and not repeated:
            route.phase(route.next_phase(float(route._probability)))
        if route.watch is not None:
            route.watch(stop, block, args, kwargs, None)
    active = [stop for stop in stops if stop.route.active]
    try:
        returning = [stop for stop in active if _prepare(stop, block, args, kwargs, repeated)]
        result = call(block, *args, **kwargs)
    except BaseException as error:
        if not repeated:  # checkpointing stops a repetition with an exception once it has what it needs
            _let_go(block, active, args, kwargs, error)
        raise
    finally:
        for stop in stops:
            stop.route._here.now.outside = False
    for stop in returning:
        result = _returned(stop, args, kwargs, result)
    for stop in stops:
        if stop.route.watch is not None:
            stop.route.watch(stop, block, args, kwargs, result)
    return result


def _prepare(stop: Stop, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], repeated: bool) -> bool:
    """Look at arguments once, and at gradients that a reentrant checkpoint would lose; whether some come back here."""
    route = stop.route
    if not (stop.checked or repeated or route.order_only):
        look(stop, block, args, kwargs)
        stop.checked = True
    if stop.first is stop.last:  # in the middle, or a route of one block
        return False
    here, grad = route._here.now, torch.is_grad_enabled()
    if not repeated:
        if stop.first:
            x = stop.places.tokens.read(args, kwargs)
            here.reentrant = not grad and isinstance(x, Tensor) and x.requires_grad
        elif not (grad or here.reentrant) and here.byp is not None and here.byp.requires_grad:
            raise RuntimeError(
                f"block {route.place(block)}, the last of a route, is in a reentrant checkpoint and the first, block "
                f"{route.start}, is not: checkpoint that one as well, or pass use_reentrant=False where the model "
                "calls torch.utils.checkpoint.checkpoint"
            )
        elif grad and here.reentrant and here.forward is not None:
            _catch(stop, here.forward)
        return False
    forward, x = route.now.forward, stop.places.tokens.read(args, kwargs)
    if not grad or forward is None or forward.recorded_gradients(x):
        return False
    if stop.last:
        _catch(stop, forward)
    return stop.first


def _catch(stop: Stop, forward: Repeatable) -> None:
    """Let the last block note the gradient of the bypassed tokens: in the first one's checkpoint they have no past."""
    route = stop.route
    keep, byp = route.now.keep, route.now.byp
    if keep is None or byp is None or not byp.is_floating_point():
        return
    leaf = byp.detach().requires_grad_()
    leaf.register_hook(forward.note_gradient)  # type: ignore[no-untyped-call]
    route.hold(keep, leaf)


def _returned(stop: Stop, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The first block's result, whose backward adds the noted gradient to what goes to the block's input."""
    x, forward = stop.places.tokens.read(args, kwargs), stop.route.now.forward
    if not x.requires_grad:
        return result
    stream = _AddNotedGradient.apply(pick(result, stop.places.out), x, forward)
    return put(result, stop.places.out, stream)


class _AddNotedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, x: Tensor, forward: Repeatable) -> Tensor:
        ctx.noted = forward
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        noted, ctx.noted.bypass_gradient = ctx.noted.bypass_gradient, None
        return grad, noted, None


def _let_go(
    block: Any, active: list[Stop], args: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException
) -> None:
    said = explain(block, active, args, kwargs, error)
    for stop in active:
        stop.route.forget()
    if said is not None:
        raise ValueError(said) from error
