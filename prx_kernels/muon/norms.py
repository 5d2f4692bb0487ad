"""Norms of gradients that lie on several ranks: one pass over all of them, one small all-reduce a way of sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .owners import is_dtensor, local
from .passes import square_sums
from .plan import Plan

Groups = tuple[Any, ...]  # process groups over which the rows of a parameter are spread


@dataclass(frozen=True)
class Measured:
    """What a step knows of its gradients before it changes anything."""

    squares: list[Tensor | None]
    """Squared norms of every plan's parts, where it needs them."""
    adam: list[Tensor]
    """Those of AdamW's parameters."""
    norm: Tensor | None
    """Of all gradients on all ranks, where they are clipped."""
    factor: Tensor | None
    """What clipping multiplies them by."""


def measure(
    plans: Sequence[Plan],
    groups: Sequence[Mapping[str, Any]],
    gradients: Mapping[Any, Tensor],
    max_norm: float | None,
    device: torch.device,
) -> Measured:
    """Norms of the gradients, in one pass over those that are needed.

    Args:
        gradients: this rank's parts.
        max_norm: what all of them together are clipped to; None: they are not.
        device: of the norm.
    """
    adam: dict[tuple[torch.device, Groups], list[Tensor]] = {}
    for group in groups:
        for param in group["params"] if not group["use_muon"] else ():
            parts = adam.setdefault((local(param).device, groups_of(param)), [])
            parts += [gradients[param]] if param in gradients else []
    needed = [plan.measured or max_norm is not None for plan in plans]
    lists = [plan.gradient_parts(gradients) if need else [] for plan, need in zip(plans, needed, strict=True)]
    found = sums_of_squares([*lists, *adam.values()], device)
    muon = [x if plan.measured else None for x, plan in zip(found, plans, strict=False)]
    rest = found[len(lists) :]
    if max_norm is None:
        return Measured(muon, rest, None, None)
    spread = [groups_of(plan.members[0].param) for plan in plans] + [groups for _, groups in adam]
    norm = total_norm(found, spread, device)
    return Measured(muon, rest, norm, clip_factor(norm, max_norm))


def groups_of(param: Any) -> Groups:
    """The process groups whose ranks hold different rows of a parameter; none for a plain tensor or a replica."""
    if not is_dtensor(param):
        return ()
    mesh = param.device_mesh
    dims = [dim for dim, placement in enumerate(param.placements) if placement.is_shard() and mesh.size(dim) > 1]
    return tuple(mesh.get_group(dim) for dim in dims)


def sums_of_squares(lists: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Squared norms of the tensors of every list, (tensors,) each and on their device; one op a device.

    Args:
        lists: each of tensors on one device.
        device: of what an empty list gives.
    """
    found = [torch.zeros(0, dtype=torch.float32, device=device)] * len(lists)
    by_device: dict[torch.device, list[int]] = {}
    for i, tensors in enumerate(lists):
        if tensors:
            by_device.setdefault(tensors[0].device, []).append(i)
    for chosen in by_device.values():
        tensors = [x for i in chosen for x in lists[i]]
        made = square_sums(tensors, [1] * len(tensors))
        for i, part in zip(chosen, made.split_with_sizes([len(lists[i]) for i in chosen]), strict=True):
            found[i] = part
    return found


def total_norm(squares: Sequence[Tensor], groups: Sequence[Groups], device: torch.device) -> Tensor:
    """The norm over all ranks of what `squares` are of, float32 and 0-dim on `device`.

    Args:
        groups: of each, in one order on all ranks, which all name the same ones.
    """
    by_groups: dict[Groups, list[Tensor]] = {}
    for part, spread in zip(squares, groups, strict=True):
        by_groups.setdefault(spread, []).append(part.sum(dtype=torch.float32).to(device, non_blocking=True))
    totals = []
    for spread, parts in by_groups.items():
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        for group in spread:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of this norm to at most `max_norm`; NaN for a norm that is not finite."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), factor, torch.nan)
