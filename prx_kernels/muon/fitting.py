"""What `Muon` may be given: settings of a group, and a saved state, held against the parameters before it is loaded.

Loaded unseen, a state of other shapes ends in the fused AdamW as a segmentation fault, and one of parameters in another
order as a run that goes on with the wrong momentum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..newton_schulz.polynomials import polynomials
from ..newton_schulz.symmetric_product import DTYPES

ADJUST_LR = (None, "original", "match_rms_adamw", "spectral_unclamped")
STATE = {True: ("momentum_buffer",), False: ("exp_avg", "exp_avg_sq")}  # of Muon, of AdamW


@dataclass(frozen=True)
class Settings:
    """What holds for all groups and is no part of a checkpoint, checked.

    Raises:
        ValueError: one is none of what it may be.
    """

    mesh: Any
    split_sizes: dict[Any, Sequence[int]]
    ns_algorithm: str
    ns_dtype: torch.dtype
    ns_preconditioner: str | None
    momentum_dtype: torch.dtype | None
    wire_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.wire_dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"wire_dtype must be bfloat16 or float32 (gradients underflow others), got {self.wire_dtype}"
            )
        if self.ns_algorithm not in ("auto", "gram", "standard"):
            raise ValueError(f"ns_algorithm must be 'auto', 'gram' or 'standard', got {self.ns_algorithm!r}")
        if self.momentum_dtype is not None and not self.momentum_dtype.is_floating_point:
            raise ValueError(f"momentum_dtype must be floating, got {self.momentum_dtype}")
        if self.ns_dtype not in DTYPES:
            raise ValueError(f"ns_dtype must be float16, bfloat16, float32 or float64, got {self.ns_dtype}")
        if self.ns_preconditioner not in (None, "aol"):
            raise ValueError(f"ns_preconditioner must be None or 'aol', got {self.ns_preconditioner!r}")


def label(group: Mapping[str, Any], position: int, number: int) -> str:
    """A parameter as an error names it."""
    names = group.get("param_names")
    return repr(names[position]) if names else f"parameter {position} of group {number}"


def check_state(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Hold a state_dict against the groups that it is to be loaded into.

    Raises:
        ValueError: groups or parameters are more or fewer, stand in another order, or are of another algorithm or
            shape than those of the state; the first such parameter is named.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the state has {len(saved)} parameter groups, and this optimizer has {len(groups)}")
    for number, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(other["params"]) != len(group["params"]):
            raise ValueError(
                f"group {number} of the state has {len(other['params'])} parameters, and here it has "
                f"{len(group['params'])}"
            )
        _check_names(group, other, number)
        muon = bool(group["use_muon"])
        if bool(other.get("use_muon", muon)) != muon:
            here, there = ("Muon", "AdamW") if muon else ("AdamW", "Muon")
            raise ValueError(f"group {number} runs {here}, and the state was saved where it ran {there}")
        for position, (param, key) in enumerate(zip(group["params"], other["params"], strict=True)):
            _check_parameter(param, state_dict["state"].get(key, {}), muon, label(group, position, number))


def _check_names(group: Mapping[str, Any], other: Mapping[str, Any], number: int) -> None:
    here, there = group.get("param_names"), other.get("param_names")
    if here is None or there is None:
        return
    for position, (mine, theirs) in enumerate(zip(here, there, strict=True)):
        if mine != theirs:
            raise ValueError(
                f"the state has {theirs!r} where parameter {position} of group {number} is {mine!r}: give the "
                f"parameters in the order in which they were saved"
            )


def _check_parameter(param: Tensor, given: Mapping[str, Any], muon: bool, name: str) -> None:
    if not given:
        return  # saved before its first gradient: it begins anew
    missing = [key for key in STATE[muon] if key not in given]
    if missing and all(key in given for key in STATE[not muon]):
        here, there = ("Muon", "AdamW") if muon else ("AdamW", "Muon")
        raise ValueError(
            f"{name} has a state of {there} ({', '.join(STATE[not muon])}), of which {here} can use nothing: "
            f"load it where the parameter runs {there} (use_muon={not muon}), or begin {here} with no state"
        )
    if missing:
        raise ValueError(f"the state of {name} lacks {', '.join(missing)}; it has {', '.join(map(str, given))}")
    for key in STATE[muon]:
        if given[key].shape != param.shape:
            raise ValueError(
                f"{name} has shape {tuple(param.shape)}, and {key} in the state has {tuple(given[key].shape)}"
            )


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse settings of a group that are out of range, each in one sentence."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    for name in ("lr", "weight_decay", "eps"):
        on_device = isinstance(group[name], Tensor) and group[name].device.type != "cpu"
        if not on_device and not group[name] >= 0:  # a value on the device would have to be waited for
            raise ValueError(f"{name} must not be negative, got {group[name]}")
    if not 0 <= group["momentum"] <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {group['momentum']}")
    if not all(0 <= beta < 1 for beta in group["betas"]) or len(group["betas"]) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if group["adjust_lr_fn"] not in ADJUST_LR:
        raise ValueError(f"adjust_lr_fn must be one of {', '.join(map(str, ADJUST_LR))}, got {group['adjust_lr_fn']!r}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} is not supported, got {group[name]!r}")
    for name in ("foreach", "fused"):
        if group.get(name) not in (None, True):
            raise ValueError(
                f"{name} must be True or left out, got {group[name]!r}: there is one implementation, which is fused "
                f"and takes all parameters at once"
            )
    polynomials(group["ns_coefficients"], group["ns_steps"])
    seen: dict[int, int] = {}
    for position, param in enumerate(group["params"]):
        if id(param) in seen:
            first, second = (label(group, i, 0).removesuffix(" of group 0") for i in (seen[id(param)], position))
            raise ValueError(f"a group must hold each parameter once, and {first} is {second} as well")
        seen[id(param)] = position


def matched(
    groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Any, Mapping[str, Any]]]:
    """Every parameter with its group and what a state that fits (`check_state`) has for it, {} for nothing."""
    saved = (key for group in state_dict["param_groups"] for key in group["params"])
    for group in groups:
        for param in group["params"]:
            yield group, param, state_dict["state"].get(next(saved), {})


def check_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a step that a CUDA graph captures with a learning rate that would be a constant in it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        for number, group in enumerate(groups):
            if not (group["capturable"] and isinstance(group["lr"], Tensor)):
                raise RuntimeError(
                    f"a captured step needs capturable=True and a learning rate in a tensor, "
                    f"but group {number} has capturable {group['capturable']} and lr {group['lr']}"
                )
