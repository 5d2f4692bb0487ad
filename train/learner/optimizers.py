"""Muon for the 2-D weights inside `blocks`, AdamW for the rest (docs/recipe.md), with one learning-rate schedule.

The split is by name and rank alone, so it can be printed before anything is trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prx_kernels import Muon
from prx_kernels.reference import cpu_has_bfloat16
from train.ranks.parallel import compute_dtype
from train.ranks.working_copy import WorkingCopy
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
    """Both algorithms in one optimizer, with one schedule and one state by parameter name.

    Parameters may be sharded: each matrix is orthogonalised by one rank of their mesh.
    """

    def __init__(self, parameters: Named, recipe: Recipe) -> None:
        muon, adam = split(parameters, recipe)
        m, a, device = recipe.muon, recipe.adam, parameters[0][1].device
        groups: list[dict[str, Any]] = [
            {"params": muon, "lr": m.lr, "weight_decay": m.weight_decay},
            {
                "params": adam,
                "use_muon": False,
                "lr": a.lr,
                "betas": a.betas,
                "eps": a.eps,
                "weight_decay": a.weight_decay,
            },
        ]
        self.named = [*muon, *adam]
        self.optimizer = Muon(
            [group for group in groups if group["params"]],
            momentum=m.momentum,
            nesterov=m.nesterov,
            ns_coefficients=m.ns_coefficients,
            ns_steps=m.ns_steps,
            ns_preconditioner=m.ns_preconditioner,
            adjust_lr_fn="match_rms_adamw",
            ns_dtype=_newton_schulz_dtype(device),
            # Where products are formed in float32, so are the updates that travel.
            wire_dtype=compute_dtype(recipe.train, device),
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, factor: float, clip: float, copies: Sequence[WorkingCopy] = ()) -> Tensor:
        """Update all parameters at `factor` times their learning rates, then drop the gradients.

        Args:
            clip: norm to which all gradients together are scaled down.
            copies: working copies of the parameters, written in the same passes.

        Returns:
            Their norm before, over all ranks, 0-dim on the device. Where it is not finite, nothing is changed on any
            rank, and nobody has to wait for the device to decide so.
        """
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step(max_norm=clip, copies=dict(pair for copy in copies for pair in copy.pairs()))
        for copy in copies:
            copy.written()
        self.optimizer.zero_grad()
        return self.optimizer.grad_norm

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor as "parameter/key", in place."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.named
            for key, value in self.optimizer.state[parameter].items()
        }


def _newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU. A CPU would only be held up by rounding to it: bfloat16 where it has instructions for that."""
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def learning_rate_factor(step: int, settings: Train) -> float:
    """Share of the learning rate at a 0-based step: linear warm-up, constant, linear cool-down to zero."""
    warm = (step + 1) / settings.warmup if settings.warmup else 1.0
    cool = (settings.steps - step) / settings.cooldown if settings.cooldown else 1.0
    return min(1.0, warm, cool)
