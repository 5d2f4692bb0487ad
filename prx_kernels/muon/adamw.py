"""AdamW for the parameters of `Muon` that are no matrices: torch's fused step, state as in torch.optim.AdamW.

A step in which any gradient is not finite is left out whole, on all ranks alike. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .norms import Measured
from .owners import is_dtensor, local
from .plan import Step

State = dict[str, Tensor]


def new_state(param: Tensor) -> State:
    """State of one parameter in the names of torch.optim.AdamW, the step counter on the parameter's device."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
    }


def any_nonfinite(params: Sequence[Any], squares: Sequence[Tensor]) -> Tensor:
    """1.0 if any gradient, on any rank that holds a part, is not finite; else 0.0. On the first parameter's device.

    Collective over the meshes of the parameters, which all ranks name in one order, with or without gradients.

    Args:
        squares: squared norms of this rank's parts of the gradients, in any number of tensors. Too large for float32
            counts as not finite, as it would be in `exp_avg_sq`.
    """
    device = local(params[0]).device
    found = torch.zeros((), dtype=torch.float32, device=device)
    for part in squares:
        if part.numel():
            bad = ~part.sum().isfinite()
            found = torch.maximum(found, bad.to(device, torch.float32, non_blocking=True))
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return found


def step_all(groups: Sequence[Mapping[str, Any]], now: Step, measured: Measured) -> Tensor | None:
    """`step` of all groups of one optimizer step, and the working copies of their parameters brought up to date.

    Returns:
        0-dim float32: 1.0 where a gradient is not finite and the step was left out, else 0.0. None without parameters.
    """
    params = [param for group in groups for param in group["params"]]
    if not params:
        return None
    if measured.norm is None:
        found = any_nonfinite(params, measured.adam)
    else:  # one norm for all: what is not finite anywhere is left out everywhere
        found = (~measured.norm.isfinite()).to(local(params[0]).device, torch.float32, non_blocking=True)
    for group in groups:
        step(group, now.states, now.gradients, found, now.factor)
    copied = [param for param in params if param in now.copies]
    if copied:
        torch._foreach_copy_([now.copies[param] for param in copied], [local(param) for param in copied])
    return found


def step(
    group: Mapping[str, Any],
    states: Mapping[Any, State],
    grads: Mapping[Any, Tensor],
    found_nonfinite: Tensor,
    factor: Tensor | None = None,
) -> None:
    """One AdamW step (https://arxiv.org/abs/1711.05101) of the group's parameters that have gradients.

    Args:
        group: params, lr (number or tensor), betas, eps, weight_decay.
        grads: this rank's parts.
        found_nonfinite: 0-dim; where it is 1.0, nothing changes, the step counter included.
        factor: 0-dim, what gradients are multiplied by; torch's kernel writes them back so.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for param in group["params"]:
        if param in grads:
            by_kind.setdefault((param.device, param.dtype), []).append(param)
    for (device, _), params in by_kind.items():
        found = found_nonfinite.to(device, non_blocking=True)
        steps = [states[param]["step"] for param in params]
        torch._foreach_add_(steps, 1)
        # A rank without a row of a parameter counts its steps all the same: the state is alike on every rank.
        held = [param for param in params if local(param).numel()]
        if held:
            divisor = None if factor is None else factor.reciprocal().to(device, non_blocking=True)
            _fused(group, held, states, grads, found, divisor)
        torch._foreach_sub_(steps, [found] * len(steps))


def _fused(
    group: Mapping[str, Any],
    params: list[Any],
    states: Mapping[Any, State],
    grads: Mapping[Any, Tensor],
    found: Tensor,
    divisor: Tensor | None,
) -> None:
    """torch's kernel, which takes the memory of all four tensors of a parameter to be in one order."""
    lists: dict[str, list[Tensor]] = {"weight": [], "grad": [], "exp_avg": [], "exp_avg_sq": []}
    copies: list[tuple[Tensor, Tensor]] = []  # what is in another order, and what stands for it
    for param in params:
        weight = local(param)
        like = torch.empty_like(weight) if not weight.is_contiguous() else weight  # dense: a view may have gaps
        tensors = {"weight": weight, "grad": grads[param]}
        tensors |= {key: local(states[param][key]) for key in ("exp_avg", "exp_avg_sq")}
        for key, tensor in tensors.items():
            if not _in_one_order(tensor, like) or tensor.dtype != like.dtype:  # a gradient may be narrower
                copy = torch.empty_like(like).copy_(tensor)
                if key != "grad":
                    copies.append((tensor, copy))
                tensor = copy
            lists[key].append(tensor)
    lr = group["lr"]
    torch._fused_adamw_(
        lists["weight"],
        lists["grad"],
        lists["exp_avg"],
        lists["exp_avg_sq"],
        [],
        [states[param]["step"] for param in params],
        lr=lr.to(found.device, non_blocking=True) if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=found,
    )
    for tensor, copy in copies:
        tensor.copy_(copy)


def _in_one_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; strides of dimensions of size one say nothing."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(a == b for size, a, b in strides if size > 1)
