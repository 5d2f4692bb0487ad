"""Parameters, gradients and steps that the tests of Muon share."""

from __future__ import annotations

import torch
from torch import nn

H = 32
SHAPES = [
    (66, 32),
    (3, 40),
    (1, 8),
    (8, 1),
    (3 * H, H),
    (2 * H, H),
    (H, H),
    (6 * H, H),
    (7 * H // 2, H),
    (H, 7 * H // 2),
]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    """At the size of PyTorch's initialisation of Linear."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter((torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)) for shape in shapes]


def fill_gradients(params, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps=5, first=0) -> None:
    for step in range(first, first + steps):
        fill_gradients(params, step)
        optimizer.step()


def error(made, expected) -> float:
    """The largest relative difference of a weight matrix."""
    with torch.no_grad():
        return max(float((p - q).norm() / q.norm()) for p, q in zip(made, expected, strict=True))
