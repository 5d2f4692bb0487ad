"""A backward without torch's engine, which needs a thread of a device that exists.

Nodes run in the order that the engine would run them in, one after the other, on whatever tensors they were recorded
with; fake tensors of a CUDA device among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(outputs: Sequence[Tensor], incoming: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by `leaves` of `outputs`, whose own are `incoming`; None for a leaf that none of them depends on."""
    roots = [(x.grad_fn, x.output_nr, grad) for x, grad in zip(outputs, incoming, strict=True) if x.grad_fn is not None]
    nodes = list(dict.fromkeys(node for node, _, _ in roots))
    waiting = _consumers(nodes)
    arrived: dict[Any, dict[int, Tensor]] = {}
    for node, slot, grad in roots:
        _add(arrived.setdefault(node, {}), slot, grad)
    ready = [node for node in nodes if waiting.get(node, 0) == 0]
    found: dict[int, Tensor] = {}
    while ready:
        node = ready.pop()
        inputs = arrived.pop(node, {})
        if _is_leaf(node):
            found[id(node.variable)] = inputs[0]
            continue
        results = _run(node, inputs) if inputs else [None] * len(node.next_functions)
        for (follower, slot), grad in zip(node.next_functions, results, strict=True):
            if follower is None:
                continue
            if grad is not None:
                shape = tuple(follower._input_metadata[slot].shape)
                summed = grad.sum_to_size(shape) if tuple(grad.shape) != shape else grad  # as the engine does
                _add(arrived.setdefault(follower, {}), slot, summed)
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    return [found.get(id(leaf)) for leaf in leaves]


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "variable")


def _consumers(roots: list[Any]) -> dict[Any, int]:
    """How many edges lead to each node that the roots reach."""
    counts: dict[Any, int] = {}
    stack, seen = list(roots), set(roots)
    while stack:
        for follower, _ in stack.pop().next_functions:
            if follower is None:
                continue
            counts[follower] = counts.get(follower, 0) + 1
            if follower not in seen:
                seen.add(follower)
                stack.append(follower)
    return counts


def _add(slots: dict[int, Tensor], slot: int, grad: Tensor) -> None:
    slots[slot] = slots[slot] + grad if slot in slots else grad


def _run(node: Any, inputs: dict[int, Tensor]) -> list[Tensor | None]:
    """One node's gradients, one for each of its edges."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        arguments = [inputs.get(slot) for slot in range(len(node._input_metadata))]
        made = node(*arguments)
        return list(made) if isinstance(made, tuple) else [made]
    # What a Function's backward is given for an output that nobody used: zeros, unless it asks for None.
    arguments = [
        inputs[slot] if slot in inputs else torch.zeros(tuple(fact.shape), dtype=fact.dtype, device=fact.device)
        for slot, fact in enumerate(node._input_metadata)
    ]
    made = node.apply(*arguments)
    made = made if isinstance(made, tuple) else (made,)
    # It gives one for each argument of its forward, and there is an edge for each tensor among those.
    wanted = iter([grad for grad, needed in zip(made, node.needs_input_grad, strict=False) if needed])
    return [next(wanted) if follower is not None else None for follower, _ in node.next_functions]
