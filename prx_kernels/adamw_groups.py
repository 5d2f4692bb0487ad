"""AdamW for the parameters of `Muon` that are no matrices: torch's fused step, state as in torch.optim.AdamW.

A step in which any gradient is not finite is left out whole, on all ranks alike. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .muon_owners import is_dtensor, local

State = dict[str, Tensor]


def new_state(param: Tensor) -> State:
    """State of one parameter in the names of torch.optim.AdamW, the step counter on the parameter's device."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(param, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
    }


def any_nonfinite(params: Sequence[Any]) -> Tensor:
    """1.0 if any of their gradients, on any rank that holds a part, is not finite; else 0.0. On the first's device.

    Collective over the meshes of the parameters, which all ranks name in one order, with or without gradients.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param in params:
        if param.grad is not None and (grad := local(param.grad)).numel():
            by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
    device = local(params[0]).device
    found = torch.zeros((), dtype=torch.float32, device=device)
    for grads in by_kind.values():
        # The largest entry of each (NaN wins): one read, nothing written, no overflow.
        largest = torch.stack(torch._foreach_norm(grads, math.inf))
        found = torch.maximum(found, (~largest.isfinite()).any().float().to(device, non_blocking=True))
    for mesh in dict.fromkeys(param.device_mesh for param in params if is_dtensor(param)):
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return found


def step(group: Mapping[str, Any], states: Mapping[Tensor, State], found_nonfinite: Tensor) -> None:
    """One AdamW step (https://arxiv.org/abs/1711.05101) of the group's parameters that have gradients.

    Args:
        group: params, lr (number or tensor), betas, eps, weight_decay.
        found_nonfinite: 0-dim; where it is 1.0, nothing changes, the step counter included.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for param in group["params"]:
        if param.grad is not None:
            by_kind.setdefault((param.device, param.dtype), []).append(param)
    for (device, _), params in by_kind.items():
        found = found_nonfinite.to(device, non_blocking=True)
        steps = [states[param]["step"] for param in params]
        torch._foreach_add_(steps, 1)
        # A rank without a row of a parameter counts its steps all the same: the state is alike on every rank.
        held = [param for param in params if local(param).numel()]
        lr = group["lr"]
        if held:
            torch._fused_adamw_(
                [local(param) for param in held],
                [local(param.grad) for param in held],
                [local(states[param]["exp_avg"]) for param in held],
                [local(states[param]["exp_avg_sq"]) for param in held],
                [],
                [states[param]["step"] for param in held],
                lr=lr.to(device, non_blocking=True) if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=None,
                found_inf=found,
            )
        torch._foreach_sub_(steps, [found] * len(steps))
