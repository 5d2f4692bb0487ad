"""Every matrix of Muon's groups, and who orthogonalises it: from parameter groups to one `Plan` a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..newton_schulz.polynomials import newton_schulz_flop, polynomials, safe_restarts
from .exchange import Exchange
from .fitting import Settings, label
from .owners import Block, Layout, layout_of, local
from .plan import Group, Member, Plan


def check_parameter(group: Group, param: Any, name: str, settings: Settings) -> None:
    """Refuse what Muon or AdamW cannot train.

    Raises:
        TypeError: it is not floating.
        ValueError: it is no matrix in a group of Muon, its `split_sizes` do not add up, or its mesh does not fit.
    """
    if not param.is_floating_point():
        raise TypeError(f"Muon needs floating-point parameters, but {name} is {param.dtype}")
    if not group["use_muon"]:
        return
    if param.ndim != 2:
        raise ValueError(
            f"Muon orthogonalises matrices, but {name} has shape {tuple(param.shape)}; "
            f"put it into a group with use_muon=False, which runs AdamW"
        )
    rows_of_matrices(group, param, name, settings)
    layout_of(param, settings.mesh, name)


def rows_of_matrices(group: Group, param: Any, name: str, settings: Settings) -> tuple[int, ...]:
    """Row counts of the matrices that a parameter consists of."""
    names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
    given = settings.split_sizes
    of_group = group["split_sizes"]
    if isinstance(of_group, Mapping):
        of_group = of_group.get(names.get(id(param)))
    sizes = given.get(param, given.get(names.get(id(param)), of_group))
    if sizes is None:
        return (param.shape[0],)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or sum(sizes) != param.shape[0]:
        raise ValueError(
            f"split_sizes must be positive numbers of rows that add up to {param.shape[0]} for {name}, "
            f"got {tuple(sizes)}"
        )
    return tuple(sizes)


def check_split_names(groups: Sequence[Group], settings: Settings) -> None:
    """Refuse `split_sizes` of what is no parameter of a Muon group."""
    known: set[Any] = set()
    for group in groups:
        if group["use_muon"]:
            known.update(group["params"], group.get("param_names", ()))
    for key in settings.split_sizes:
        if key not in known:
            what = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
            raise ValueError(f"split_sizes names {what}, which is no parameter of a Muon group")


def plans_of(groups: Sequence[Group], settings: Settings) -> list[Plan]:
    """Every matrix to its owner: one plan for each layout, dtype on the wire and device."""
    found: dict[tuple[Layout, torch.dtype, torch.device], tuple[list[Member], list[Block]]] = {}
    for number, group in enumerate(groups):
        for i, param in enumerate(group["params"] if group["use_muon"] else ()):
            name = label(group, i, number)
            layout, row = layout_of(param, settings.mesh, name), 0
            wire = torch.float32 if layout.ranks == 1 else settings.wire_dtype
            wire = torch.float64 if param.dtype == torch.float64 else wire
            members, blocks = found.setdefault((layout, wire, local(param).device), ([], []))
            for rows in rows_of_matrices(group, param, name, settings) if param.numel() else ():
                members.append(Member(param, number))
                blocks.append(Block(param.shape[0], row, rows, param.shape[1], _cost(group, rows, param, settings)))
                row += rows
    plans = []
    for (layout, wire, device), (members, blocks) in found.items():
        scaled = torch.float64 not in (wire, settings.ns_dtype)
        if blocks:
            held = settings.ns_dtype if scaled else wire
            plans.append(Plan(members, Exchange(blocks, layout, wire, device), held, scaled))
    return plans


def _cost(group: Group, rows: int, param: Tensor, settings: Settings) -> float:
    """Operations of a matrix's Newton-Schulz."""
    steps = group["ns_steps"]
    restarts = safe_restarts(polynomials(group["ns_coefficients"], steps), settings.ns_dtype)
    costs = {
        "gram": newton_schulz_flop(rows, param.shape[1], steps, algorithm="gram", restarts=restarts),
        "standard": newton_schulz_flop(rows, param.shape[1], steps, algorithm="standard"),
    }
    return costs.get(settings.ns_algorithm, min(costs.values()))
