"""Muon for the 2-D weights inside `blocks`, AdamW for the rest (RECIPE.md), with one learning-rate schedule.

The split is by name and rank alone, so it can be printed before anything is trained.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.errors import UserError
from train.recipes import Recipe, Train

Named = list[tuple[str, nn.Parameter]]


def named_parameters(modules: dict[str, nn.Module]) -> Named:
    """Trained parameters of all modules as ("module.name", parameter), in a fixed order."""
    return [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def split(parameters: Named, recipe: Recipe) -> tuple[Named, Named]:
    """Parameters of Muon (2-D weights inside `blocks`, modulation too) and of AdamW (all others)."""
    muon = [(n, p) for n, p in parameters if recipe.muon.enabled and ".blocks." in n and p.ndim == 2]
    names = {name for name, _ in muon}
    return muon, [(n, p) for n, p in parameters if n not in names]


class Optimizers:
    """Both optimizers behind one `step`, one `zero_grad` and one state by parameter name."""

    def __init__(self, parameters: Named, recipe: Recipe) -> None:
        muon, adam = split(parameters, recipe)
        self.parts: list[tuple[torch.optim.Optimizer, Named, float]] = []
        if muon:
            m = recipe.muon
            optimizer = torch.optim.Muon(
                [p for _, p in muon],
                lr=m.lr,
                weight_decay=m.weight_decay,
                momentum=m.momentum,
                nesterov=m.nesterov,
                ns_coefficients=m.ns_coefficients,
                ns_steps=m.ns_steps,
                adjust_lr_fn="match_rms_adamw",
            )
            self.parts.append((optimizer, muon, m.lr))
        a = recipe.adam
        adamw = torch.optim.AdamW([p for _, p in adam], lr=a.lr, betas=a.betas, eps=a.eps, weight_decay=a.weight_decay)
        self.parts.append((adamw, adam, a.lr))

    def step(self, factor: float) -> None:
        """Update all parameters at `factor` times their learning rates, then drop the gradients."""
        for optimizer, _, lr in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor as "parameter/key"."""
        return {
            f"{name}/{key}": value
            for optimizer, named, _ in self.parts
            for name, parameter in named
            for key, value in optimizer.state[parameter].items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put a state back.

        Raises:
            UserError: states of other parameters than this model's.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            by_name.setdefault(name, {})[key] = value
        known = {name for _, named, _ in self.parts for name, _ in named}
        if set(by_name) != known:
            odd = sorted(set(by_name) ^ known)
            raise UserError(f"optimizer state does not fit this model: {', '.join(odd[:3])}")
        for optimizer, named, _ in self.parts:
            groups = optimizer.state_dict()["param_groups"]
            states: dict[int, Any] = {i: by_name[name] for i, (name, _) in enumerate(named)}
            optimizer.load_state_dict({"state": states, "param_groups": groups})


def learning_rate_factor(step: int, settings: Train) -> float:
    """Share of the learning rate at a 0-based step: linear warm-up, constant, linear cool-down to zero."""
    warm = (step + 1) / settings.warmup if settings.warmup else 1.0
    cool = (settings.steps - step) / settings.cooldown if settings.cooldown else 1.0
    return min(1.0, warm, cool)


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale gradients to a global norm of at most `limit`; gives the norm before, a 0-dim tensor on the device."""
    return torch.nn.utils.clip_grad_norm_(list(parameters), limit)
