"""The optimizer step on all weights of the PRX denoiser: Muon for the matrices inside blocks, AdamW for the rest.

Checked by the update of the first block against the plain formulas in float64, then timed as one step.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.machine import device
from benchmarks.measure import Measure
from benchmarks.peers import require
from benchmarks.roofline import Cost, adamw_step, muon_step, prx_muon_shapes
from prx_model.config import PRXConfig, prx_1_2b

GPU = torch.cuda.is_available()
TINY = PRXConfig(context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=(8, 8), bottleneck_size=16)
CONFIG = prx_1_2b() if GPU else TINY
LR, MOMENTUM = 1e-4, 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices() -> list[nn.Parameter]:
    """Muon's weights with gradients, random."""
    generator = torch.Generator(device=device()).manual_seed(0)
    made = []
    for shape in prx_muon_shapes(CONFIG):
        weight = nn.Parameter(torch.randn(shape, generator=generator, device=device()) * shape[1] ** -0.5)
        weight.grad = torch.randn(shape, generator=generator, device=device()) * 1e-3
        made.append(weight)
    return made


def first_update(weight: Tensor, gradient: Tensor) -> Tensor:
    """The first Muon step without weight decay, in float64: Nesterov momentum, five iterations, matched RMS."""
    g = gradient.double() * (1 - MOMENTUM)
    x = gradient.double() * (1 - MOMENTUM) + MOMENTUM * g
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / (wide.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    update = wide if x.shape[0] <= x.shape[1] else wide.mT
    return weight.double() - LR * 0.2 * max(weight.shape) ** 0.5 * update


@pytest.mark.parametrize("way", ["torch.optim.Muon"])
def test_muon_step(measure: Measure, way: str) -> None:
    require(way)
    weights = matrices()
    optimizer = torch.optim.Muon(
        weights,
        lr=LR,
        weight_decay=0.0,
        momentum=MOMENTUM,
        ns_coefficients=COEFFICIENTS,
        adjust_lr_fn="match_rms_adamw",
    )

    def error_of_the_first_step(run: Any, arguments: Any) -> float:
        before = [w.detach().clone() for w in weights[:7]]
        run(*arguments)
        worst = 0.0
        for old, new in zip(before, weights, strict=False):
            assert new.grad is not None
            truth = first_update(old, new.grad) - old.double()
            worst = max(worst, float((new.detach().double() - old.double() - truth).norm() / truth.norm()))
        return worst

    measure(
        op="Muon step",
        case=f"{len(weights)} matrices, {sum(w.numel() for w in weights) / 1e6:.4g} M numbers",
        way=way,
        function=optimizer.step,
        inputs=lambda seed: (),
        verify=error_of_the_first_step,
        cost=muon_step(prx_muon_shapes(CONFIG)),
        # torch iterates in bf16: singular values differ by up to 0.05 of the polynomial's own spread.
        tolerance=0.1,
        graph=False,
    )


@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_adamw_step(measure: Measure, way: str) -> None:
    """On everything that is not Muon's: about 0.2 B numbers at PRX's size."""
    from prx_model import PRXTransformer

    with torch.device("meta"):
        shapes = [p.shape for n, p in PRXTransformer(CONFIG).named_parameters() if "blocks." not in n or p.ndim != 2]
    generator = torch.Generator(device=device()).manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator, device=device())) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator, device=device())
    settings = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(weights, **settings, foreach=way == "foreach", fused=way == "fused")  # type: ignore[arg-type]

    def error_of_the_first_step(run: Any, arguments: Any) -> float:
        before = [w.detach().clone() for w in weights]
        run(*arguments)
        # Bias correction makes the first step lr·g / (|g| + eps).
        moves = [(o.double() - n.detach().double(), n.grad.double()) for o, n in zip(before, weights, strict=True)]  # type: ignore[union-attr]
        return max(float((move - LR * g / (g.abs() + 1e-8)).norm() / move.norm()) for move, g in moves)

    numbers = sum(w.numel() for w in weights)
    measure(
        op="AdamW step",
        case=f"{len(weights)} tensors, {numbers / 1e6:.4g} M numbers",
        way=f"torch.optim.AdamW {way}",
        function=optimizer.step,
        inputs=lambda seed: (),
        verify=error_of_the_first_step,
        cost=Cost(adamw_step(numbers).nbytes),
        tolerance=1e-2,  # weights of order one keep 2^-24: a step of 1e-4 is known to 6e-4
        graph=False,
    )
