"""Products whose result is symmetric, at half the work: the n×n part of Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..launch import custom_op, on_cpu
from . import reference
from . import symmetric_kernels as kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# --- public ------------------------------------------------------------------------------------------------------


def sym_gemm(
    A: Tensor,
    B: Tensor,
    *,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`alpha·A·Bᵀ + beta·C + gamma·I` where the caller promises that the result is symmetric; half a product's work.

    Only the upper triangle is computed and mirrored, so the result is exactly symmetric. The promise holds for A = B
    and for symmetric A, B that commute; it is not checked, and where it is broken the lower triangle is wrong.

    Args:
        A: (n, k) or (batch, n, k), float16, bfloat16, float32 or float64. Any strides; a matrix whose rows or whose
            columns are dense is read in place, other layouts are copied.
        B: as A.
        C: like the result and symmetric too; not read for beta = 0.
        alpha: a number, not a tensor.
        beta: the same.
        gamma: the same.
        scales: float32 (batch,): what the operands A and B of each matrix are multiplied by, without a pass over them.
        out: where to put the result; it shares no memory with A, B or C.

    Returns:
        (n, n) or (batch, n, n) in the dtype of A; sums and the epilogue are in float32, rounded once. float32 products
        are IEEE, not TF32. float64 runs the plain definition.

    Raises:
        ValueError: shapes do not fit, beta without C, or out overlaps an input.
        TypeError: dtypes differ or are not floating.
        RuntimeError: an operand requires a gradient while gradients are recorded: the op has none.
    """
    check_no_grad("sym_gemm", [x for x in (A, B, C, scales, out) if x is not None])
    _check_operands(A, B, C, beta, out)
    if scales is not None and (scales.shape != A.shape[:-2] or scales.dtype != torch.float32):
        raise ValueError(
            f"scales must be float32 of shape {tuple(A.shape[:-2])}, got {scales.dtype} of {tuple(scales.shape)}"
        )
    batched = [x.unsqueeze(0) if x is not None and x.ndim == 2 else x for x in (A, B, C, out)]
    a, b, c, result = batched
    c = c if beta != 0.0 else None
    alpha, beta, gamma = float(alpha), float(beta), float(gamma)
    scales = scales.reshape(1) if scales is not None and scales.ndim == 0 else scales
    if result is not None and out is not None:
        _sym_gemm_out(a, b, c, alpha, beta, gamma, result, scales)
        return out
    made: Tensor = _sym_gemm(a, b, c, alpha, beta, gamma, scales)
    return made if A.ndim == 3 else made[0]


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("sym_gemm")
def _sym_gemm(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, scales: Tensor | None = None
) -> Tensor:
    out = A.new_empty((A.shape[0], A.shape[1], A.shape[1]))
    kernels.sym_gemm(A, B, C, alpha, beta, gamma, out, scales)
    return out


@on_cpu(_sym_gemm)
def _(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, scales: Tensor | None = None
) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return reference.sym_gemm(A, B, C, alpha=alpha, beta=beta, gamma=gamma, scales=scales)


@_sym_gemm.register_fake
def _(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, scales: Tensor | None = None
) -> Tensor:
    return A.new_empty((A.shape[0], A.shape[1], A.shape[1]))


@custom_op("sym_gemm_out", mutates=("out",))
def _sym_gemm_out(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, out: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    _check_overlap(out, A, B, C)
    kernels.sym_gemm(A, B, C, alpha, beta, gamma, out, scales)


@on_cpu(_sym_gemm_out)
def _(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, out: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    _check_overlap(out, A, B, C)
    with torch.autocast("cpu", enabled=False):
        out.copy_(reference.sym_gemm(A, B, C, alpha=alpha, beta=beta, gamma=gamma, scales=scales))


@_sym_gemm_out.register_fake
def _(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, gamma: float, out: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    return None


# --- checks ------------------------------------------------------------------------------------------------------


def _check_operands(A: Tensor, B: Tensor, C: Tensor | None, beta: float, out: Tensor | None) -> None:
    if A.ndim not in (2, 3) or A.shape != B.shape:
        raise ValueError(
            f"sym_gemm needs A and B of one shape (n, k) or (batch, n, k), got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if beta != 0.0 and C is None:
        raise ValueError(f"sym_gemm needs C where beta is not 0, got beta {beta} and no C")
    square = (*A.shape[:-1], A.shape[-2])
    for name, x in (("C", C), ("out", out)):
        if x is not None and x.shape != square:
            raise ValueError(f"{name} must have the shape of the result, {square}, got {tuple(x.shape)}")
    for name, x in (("A", A), ("B", B), ("C", C), ("out", out)):
        if x is not None and (x.dtype not in DTYPES or x.dtype != A.dtype):
            raise TypeError(f"sym_gemm needs tensors of one floating dtype, got {name} of {x.dtype} beside {A.dtype}")
        if x is not None and x.device != A.device:
            raise ValueError(f"sym_gemm needs tensors of one device, got {name} on {x.device} and A on {A.device}")


def _check_overlap(out: Tensor, *inputs: Tensor | None) -> None:
    first, last = _extent(out)
    for x in inputs:
        if x is not None and x.numel() and out.numel():
            start, end = _extent(x)
            if first < end and start < last:
                raise ValueError("out must not share memory with A, B or C: pass a tensor of its own")


def _extent(x: Tensor) -> tuple[int, int]:
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (span + 1) * x.element_size()


def check_no_grad(name: str, tensors: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(f"{name} has no gradient: detach its input or call it under torch.no_grad()")
