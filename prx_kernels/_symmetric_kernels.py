"""Triton kernels of symmetric products and what launches them; the ops that use them stand in newton_schulz.py."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def sym_gemm(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, out: Tensor) -> None:
    out.copy_(reference.sym_gemm(A, B, C, alpha=alpha, beta=beta, gamma=gamma))


def unit_norm(G: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    return reference.unit_norm(G, dtype, eps=eps)
