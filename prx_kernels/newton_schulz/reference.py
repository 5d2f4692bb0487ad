"""Plain-PyTorch definition of symmetric products and of Newton-Schulz, plain and in the Gram form."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..launch import widened


def sym_gemm(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scales: Tensor | None = None,
) -> Tensor:
    """`alpha·A·Bᵀ + beta·C + gamma·I` for (..., n, k) operands, the upper triangle mirrored; dtype of A.

    Formed in float32 (float64 for float64) and rounded once. beta = 0 does not read C. A and B of each matrix are
    multiplied by its number in `scales` (...), if there are any.
    """
    dtype = A.dtype
    if gamma != 0.0:  # so that a CPU which multiplies bfloat16 does not round before it is added
        A, B, C = widened(A), widened(B), None if C is None else widened(C)
    if scales is None:
        product = _plus_product(C, A, B.mT, beta=beta, alpha=alpha)
    else:
        product = widened(_plus_product(None, A, B.mT, beta=0.0, alpha=alpha)) * scales.square()[..., None, None]
        product = product if C is None or beta == 0.0 else product.add_(C, alpha=beta)
    if gamma != 0.0:
        product.diagonal(dim1=-2, dim2=-1).add_(gamma)
    upper = torch.ones(product.shape[-2:], dtype=torch.bool, device=product.device).triu()
    return torch.where(upper, product, product.mT).to(dtype)


def multiply(Q: Tensor, X: Tensor, *, beta: float = 0.0) -> Tensor:
    """`Q·X + beta·X`, formed in float32 (float64 for float64) and rounded once."""
    return _plus_product(X, Q, X, beta=beta).to(X.dtype)


def _plus_product(C: Tensor | None, left: Tensor, right: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """`beta·C + alpha·left·right` in one product of BLAS, in the dtype that sums are formed in.

    bfloat16 stays as it is on a CPU with instructions for it, which sum in float32.
    """
    if not (left.dtype == torch.bfloat16 and cpu_has_bfloat16() and left.device.type == "cpu"):
        C, left, right = None if C is None else widened(C), widened(left), widened(right)
    if C is None or beta == 0.0:
        product = left @ right
        return product if alpha == 1.0 else product * alpha
    if left.ndim == 2:
        return torch.addmm(C, left, right, beta=beta, alpha=alpha)
    batched = (x.expand(*left.shape[:-2], *x.shape[-2:]).flatten(0, -3) for x in (C, left, right))
    return torch.baddbmm(*batched, beta=beta, alpha=alpha).view(*left.shape[:-2], left.shape[-2], right.shape[-1])


@lru_cache(maxsize=1)
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own (AVX-512 BF16, AMX, Arm's)."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def unit_norm(G: Tensor, dtype: torch.dtype, *, eps: float) -> Tensor:
    """`G / (‖G‖_F + eps)` for each matrix of (..., rows, columns), rounded to `dtype`.

    The norm is taken in float32 (float64 for float64) of G over its largest entry, so that no finite G overflows.
    """
    wide = widened(G)
    # Below 1e-30 eps outweighs any norm; a divisor that small would make eps / largest overflow.
    largest = wide.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
    wide = wide / largest
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    unit: Tensor = wide / (norm + eps / largest).clamp(min=1e-30)
    return unit.to(dtype)


def newton_schulz(
    G: Tensor,
    steps: Sequence[tuple[float, float, float]],
    *,
    restarts: Sequence[int] | None,
    dtype: torch.dtype,
    eps: float = 1e-7,
) -> Tensor:
    """Newton-Schulz of (..., rows, columns) with `steps` (a, b, c); every product is rounded to `dtype`.

    `restarts=None` is the plain iteration X <- aX + (bA + cA²)X with A = X·Xᵀ; otherwise the Gram form, where R = X·Xᵀ
    is iterated on its own and formed anew before the steps named in `restarts`.
    """
    tall = G.shape[-2] > G.shape[-1]
    X = unit_norm(G.mT if tall else G, dtype, eps=eps)
    if restarts is None:
        for a, b, c in steps:
            A = sym_gemm(X, X)
            X = multiply(sym_gemm(A, A, A, alpha=c, beta=b), X, beta=a)
    else:
        X = _gram_form(X, steps, restarts)
    return (X.mT if tall else X).to(G.dtype)


def _gram_form(X: Tensor, steps: Sequence[tuple[float, float, float]], restarts: Sequence[int]) -> Tensor:
    R, Q = sym_gemm(X, X), None
    for t, (a, b, c) in enumerate(steps):
        if t in restarts and Q is not None:
            X = multiply(Q, X)
            R, Q = sym_gemm(X, X), None
        Z = sym_gemm(R, R, R, alpha=c, beta=b)
        Q = Z + a * torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device) if Q is None else sym_gemm(Q, Z, Q, beta=a)
        if t + 1 < len(steps) and t + 1 not in restarts:
            RZ = sym_gemm(R, Z, R, beta=a)
            R = sym_gemm(Z, RZ, RZ, beta=a)
    assert Q is not None
    return multiply(Q, X)
