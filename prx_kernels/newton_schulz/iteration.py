"""Newton-Schulz orthogonalisation for Muon: the symmetric products of many matrices as one batch, half the work each.

`newton_schulz` takes one matrix or a list of mixed shapes. In the Gram form nearly all work is on n×n matrices, n the
smaller side, so that matrices of different shapes with equal n share every launch of `sym_gemm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor

from ..launch import custom_op, on_cpu
from . import norm_kernels, reference
from .polynomials import Coefficients, Polynomial, newton_schulz_flop, polynomials, safe_restarts
from .symmetric_product import DTYPES, check_no_grad, sym_gemm

# --- public ------------------------------------------------------------------------------------------------------


@overload
def newton_schulz(
    G: Tensor,
    *,
    ns_coefficients: Coefficients = ...,
    ns_steps: int = ...,
    algorithm: str = ...,
    restarts: str | Sequence[int] = ...,
    dtype: torch.dtype = ...,
    eps: float = ...,
    preconditioner: str | None = ...,
    scales: Tensor | None = ...,
) -> Tensor: ...
@overload
def newton_schulz(
    G: Sequence[Tensor],
    *,
    ns_coefficients: Coefficients = ...,
    ns_steps: int = ...,
    algorithm: str = ...,
    restarts: str | Sequence[int] = ...,
    dtype: torch.dtype = ...,
    eps: float = ...,
    preconditioner: str | None = ...,
    scales: Tensor | None = ...,
) -> list[Tensor]: ...
def newton_schulz(
    G: Tensor | Sequence[Tensor],
    *,
    ns_coefficients: Coefficients = "jordan",
    ns_steps: int = 5,
    algorithm: str = "auto",
    restarts: str | Sequence[int] = "auto",
    dtype: torch.dtype = torch.float16,
    eps: float = 1e-7,
    preconditioner: str | None = None,
    scales: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Orthogonalise matrices: the nearest semi-orthogonal U·Vᵀ of G = U·Σ·Vᵀ, approximately (Muon's update).

    Each matrix is divided by its Frobenius norm plus eps and iterated X <- aX + b(XXᵀ)X + c(XXᵀ)²X. Never waits for the
    device, uses no atomics, and matrices do not influence one another.

    Args:
        G: one matrix (rows, columns), a batch (..., rows, columns), or a sequence of such of any shapes and both
            orientations. Floating; any strides; entries of any finite size. Matrices of one smaller side and algorithm
            share the launches of their n×n products, whatever their other side.
        ns_coefficients: "jordan" (3.4445, -4.7750, 2.0315), "polar_express" (https://arxiv.org/abs/2505.16932 with
            safety factor 1.05), one triple (a, b, c), or a sequence of triples: the first `ns_steps` are taken, the
            last is repeated if there are fewer.
        ns_steps: number of iterations, at least 1.
        algorithm: "standard" multiplies X in every step; "gram" iterates on X·Xᵀ, n×n, and multiplies X once at every
            restart and at the end; "auto" takes, shape by shape, the one of fewer operations (`newton_schulz_flop`):
            Gram for rectangular matrices, standard for square ones.
        restarts: steps before which the Gram form recomputes X·Xᵀ, each in 1 … ns_steps-1 (steps count from 0). "auto"
            derives the fewest that are safe for these coefficients in this dtype (`safe_restarts`): Jordan before step
            3 and Polar Express before step 2 in float16. bfloat16 needs two, before 2 and 3 (with one, Polar Express
            gives singular values of 1.7 where 1.12 is right), and float32 none in five steps.
        dtype: in which the iteration runs; every product is accumulated in float32 and rounded to it once (the general
            ones by cuBLAS, as `torch.backends.cuda.matmul` is set). bfloat16 is as fast as float16 and eight times less
            exact; numbers here are of size 1, so its range gains nothing.
        eps: added to the norm; a zero matrix gives zeros.
        preconditioner: None or "aol": rows (of tall matrices columns) are divided by the roots of the absolute row sums
            of X·Xᵀ (Turbo-Muon, https://arxiv.org/abs/2512.04632), which brings singular values nearer to 1 and never
            above it. The result is that of the scaled matrix, another one than that of G; tests hold both on the
            spectra of KERNELS.md. It costs no pass over G in the Gram form.
        scales: float32 (matrices,) on the device, one number for every matrix in the order of G. G is then of `dtype`
            and not divided by its norm: scales·G stands for the matrix, of a norm of at most 1, and scales·result for
            the result. So whoever knows the norms spares two passes.

    Returns:
        As G: a tensor, or a list, of the shapes and dtypes of G. A matrix with NaN or infinity gives NaN, alone.

    Raises:
        ValueError: an argument is out of range, or G has fewer than two dimensions.
        TypeError: G or dtype is not floating, or tensors hold no numbers (device "meta").
        RuntimeError: G requires a gradient while gradients are recorded: there is no backward.
    """
    matrices = [G] if isinstance(G, Tensor) else list(G)
    steps = polynomials(ns_coefficients, ns_steps)
    resets = _resolve(steps, algorithm, restarts, dtype)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if preconditioner not in (None, "aol"):
        raise ValueError(f"preconditioner must be None or 'aol', got {preconditioner!r}")
    _check_matrices(matrices)
    if scales is not None:
        _check_scales(matrices, dtype, scales)
    results = _orthogonalise(matrices, steps, algorithm, resets, dtype, eps, scales, preconditioner == "aol")
    results = [y.to(x.dtype) for x, y in zip(matrices, results, strict=True)]
    return results[0] if isinstance(G, Tensor) else results


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5) -> Tensor:
    """`newton_schulz` under the name and with the result of https://kellerjordan.github.io/posts/muon/: bfloat16.

    The iteration itself runs in float16, which is as fast and nearer to exact arithmetic.

    Args:
        G: (..., rows, columns), floating.
        steps: number of iterations with Jordan's coefficients.

    Returns:
        bfloat16, of the shape of G.
    """
    return newton_schulz(G, ns_steps=steps).to(torch.bfloat16)


# --- the iteration -----------------------------------------------------------------------------------------------


@dataclass
class _Stack:
    """All matrices of one shape: X is (count, n, m) with n <= m, a transposed view for tall ones."""

    members: list[int]  # positions in the list given
    X: Tensor
    tall: bool
    scales: Tensor | None  # (count,): what stands for the matrices is X times these

    def times(self, Q: Tensor, *, beta: float = 0.0, symmetric: bool = True) -> Tensor:
        """Q·X + beta·X, in the memory layout of X.

        A general product through cuBLAS: the same rate as a kernel of ours could reach, tuned for every shape and chip.
        """
        if not self.X.is_cuda:  # half-precision products of a CPU are slow, or sum in half precision
            return reference.multiply(Q, self.X, beta=beta)
        left, right = (self.X.mT, Q if symmetric else Q.mT) if self.tall else (Q, self.X)
        addend = left if self.tall else right
        made = torch.baddbmm(addend, left, right, beta=beta) if beta else torch.bmm(left, right)
        return made.mT if self.tall else made


def _orthogonalise(
    matrices: list[Tensor],
    steps: tuple[Polynomial, ...],
    algorithm: str,
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    eps: float,
    scales: Tensor | None,
    aol: bool,
) -> list[Tensor]:
    """`newton_schulz` with checked arguments; results are of `dtype`."""
    results = [x.new_zeros(x.shape, dtype=dtype) if x.numel() == 0 else x for x in matrices]
    by_shape: dict[tuple[torch.device, int, int], list[int]] = {}
    for i, x in enumerate(matrices):
        if x.numel():
            by_shape.setdefault((x.device, x.shape[-2], x.shape[-1]), []).append(i)
    # Which matrices share their n×n products: equal device, smaller side and algorithm.
    batches: dict[tuple[torch.device, int, bool], list[list[int]]] = {}
    for (device, rows, columns), members in by_shape.items():
        gram = algorithm == "gram" or (algorithm == "auto" and _gram_is_cheaper(rows, columns, len(steps), restarts))
        batches.setdefault((device, min(rows, columns), gram), []).append(members)
    for (device, _, gram), shapes in batches.items():
        with torch.no_grad(), _exact_dtypes(device):
            stacks = [_stack(matrices, members, dtype, eps, scales) for members in shapes]
            (_gram_form if gram else _standard_form)(stacks, steps, restarts, aol)
            for stack in stacks:
                _unstack(stack, results)
    return results


def _stack(matrices: list[Tensor], members: list[int], dtype: torch.dtype, eps: float, scales: Tensor | None) -> _Stack:
    """The matrices of one shape behind one another, in the layout they came in; normalised without scales."""
    rows, columns = matrices[members[0]].shape[-2:]
    parts = [matrices[i].reshape(-1, rows, columns) for i in members]
    if scales is not None:
        X = _behind_one_another(parts)
        firsts = [0, *accumulate(x.shape[:-2].numel() for x in matrices)]
        if members == list(range(members[0], members[-1] + 1)):
            chosen = scales[firsts[members[0]] : firsts[members[-1] + 1]]
        else:
            chosen = torch.cat([scales[firsts[i] : firsts[i + 1]] for i in members])
        return _Stack(members, X.mT if rows > columns else X, rows > columns, chosen)
    X = parts[0].new_empty((sum(part.shape[0] for part in parts), rows, columns), dtype=dtype)
    for part, place in zip(parts, X.split_with_sizes([part.shape[0] for part in parts]), strict=True):
        _unit_norm(part, eps, place)
    return _Stack(members, X.mT if rows > columns else X, rows > columns, None)


def _behind_one_another(parts: list[Tensor]) -> Tensor:
    """Batches (count, rows, columns) as one: without a copy where they lie so in memory."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not (same and part.is_contiguous() and part.storage_offset() == at):
            return torch.cat(parts)
        at += part.numel()
    count = sum(part.shape[0] for part in parts)
    return first.as_strided((count, *first.shape[1:]), first[:1].stride())


def _unstack(stack: _Stack, results: list[Tensor]) -> None:
    Y = stack.X.mT if stack.tall else stack.X
    shapes = [results[i].shape for i in stack.members]
    parts = Y.split_with_sizes([shape[:-2].numel() for shape in shapes])
    for i, shape, part in zip(stack.members, shapes, parts, strict=True):
        results[i] = part.reshape(shape)


def _standard_form(stacks: list[_Stack], steps: tuple[Polynomial, ...], _: tuple[int, ...], aol: bool) -> None:
    for t, (a, b, c) in enumerate(steps):
        if aol and t == 0:
            A, rows = _almost_orthogonal(stacks)
            for stack, part in zip(stacks, rows.split_with_sizes([stack.X.shape[0] for stack in stacks]), strict=True):
                stack.X = (stack.X * part[..., None]).to(stack.X.dtype)
        else:
            A = _gram(stacks)
        _multiply(stacks, sym_gemm(A, A, C=A, alpha=c, beta=b), beta=a)


def _gram_form(stacks: list[_Stack], steps: tuple[Polynomial, ...], restarts: tuple[int, ...], aol: bool) -> None:
    """X <- Q·X with Q = Π p(R), R <- R·p(R)² and p(R) = aI + Z, Z = bR + cR²: all symmetric, and all commute."""
    Q: Tensor | None = None
    rows: Tensor | None = None  # what the rows of X are still to be multiplied by
    if aol:
        R, rows = _almost_orthogonal(stacks)
    else:
        R = _gram(stacks)
    for t, (a, b, c) in enumerate(steps):
        if t in restarts and Q is not None:
            _multiply(stacks, Q, rows=rows)
            R, Q, rows = _gram(stacks), None, None
        Z = sym_gemm(R, R, C=R, alpha=c, beta=b)
        if Q is not None:
            Q = sym_gemm(Q, Z, C=Q, beta=a)
        if t + 1 < len(steps) and t + 1 not in restarts:
            RZ = sym_gemm(R, Z, C=R, beta=a)
            R = sym_gemm(Z, RZ, C=RZ, beta=a)
        if Q is None:
            Q = Z  # which nobody needs any more
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
    assert Q is not None, "there is at least one step"
    _multiply(stacks, Q, rows=rows)


# X·Xᵀ has entries of 1/n and, off the diagonal, smaller by far: times this, float16 holds them and their sums.
_LARGER = 64.0
_MOST = 512.0  # that a row of X is multiplied by: Q times it stays in the range of float16


def _almost_orthogonal(stacks: list[_Stack]) -> tuple[Tensor, Tensor]:
    """S·X·Xᵀ·S, and the diagonal of S, float32 (matrices, n): one over the roots of the absolute row sums of X·Xᵀ.

    No eigenvalue of the product is above one (Gershgorin, for a similar matrix): the almost orthogonal layer of
    https://arxiv.org/abs/2208.03160.
    """
    R = _gram(stacks, alpha=_LARGER)
    sums = torch.linalg.vector_norm(R, 1, dim=-1, dtype=torch.promote_types(R.dtype, torch.float32))
    rows = torch.where(sums > 0, (sums / _LARGER).rsqrt().clamp(max=_MOST), sums)
    both = rows[..., :, None] * rows[..., None, :] / _LARGER
    return torch.mul(R, both).to(R.dtype), rows


def _gram(stacks: list[_Stack], alpha: float = 1.0) -> Tensor:
    """alpha·X·Xᵀ of every matrix of every stack, one behind the other, of what X stands for."""
    if len(stacks) == 1:
        return sym_gemm(stacks[0].X, stacks[0].X, alpha=alpha, scales=stacks[0].scales)
    counts = [stack.X.shape[0] for stack in stacks]
    n = stacks[0].X.shape[1]
    R = stacks[0].X.new_empty((sum(counts), n, n))
    for stack, part in zip(stacks, R.split_with_sizes(counts), strict=True):
        sym_gemm(stack.X, stack.X, alpha=alpha, scales=stack.scales, out=part)
    return R


def _multiply(stacks: list[_Stack], Q: Tensor, *, beta: float = 0.0, rows: Tensor | None = None) -> None:
    """X <- Q·X + beta·X, or Q·diag(rows)·X."""
    Q = Q if rows is None else (Q * rows[..., None, :]).to(Q.dtype)
    for stack, part in zip(stacks, Q.split_with_sizes([stack.X.shape[0] for stack in stacks]), strict=True):
        stack.X = stack.times(part, beta=beta, symmetric=rows is None)


# Square matrices cost the same operations in both forms. They stay in the standard form, by counted time: of its ten
# symmetric and five general products the general ones run at cuBLAS' rate. With rounds of 132 tiles of 128² at 80 % and
# cuBLAS at 90 % of an H200, one square matrix beside two others takes 0.56 ms that way and 0.57 ms in their batch, two
# beside two 0.76 and 0.80, eight beside twenty 4.25 and 4.36.
def _gram_is_cheaper(rows: int, columns: int, ns_steps: int, restarts: tuple[int, ...]) -> bool:
    gram = newton_schulz_flop(rows, columns, ns_steps, algorithm="gram", restarts=restarts)
    return gram < newton_schulz_flop(rows, columns, ns_steps, algorithm="standard")


def _exact_dtypes(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would turn the float16 products of cuBLAS into bfloat16 ones."""
    return torch.autocast(device.type, enabled=False)


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("unit_norm", mutates=("out",))
def _unit_norm(G: Tensor, eps: float, out: Tensor) -> None:
    norm_kernels.unit_norm(G, eps, out)


@on_cpu(_unit_norm)
def _(G: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(reference.unit_norm(G, out.dtype, eps=eps))


@_unit_norm.register_fake
def _(G: Tensor, eps: float, out: Tensor) -> None:
    return None


# --- checks ------------------------------------------------------------------------------------------------------


def _check_matrices(matrices: list[Tensor]) -> None:
    for x in matrices:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"newton_schulz needs floating-point tensors, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.device.type == "meta":
            raise TypeError(
                f"newton_schulz needs numbers, got a tensor on the device meta of shape {tuple(x.shape)}; "
                f"under a FakeTensorMode it gives shapes"
            )
        if x.ndim < 2:
            raise ValueError(f"newton_schulz needs matrices (..., rows, columns), got shape {tuple(x.shape)}")
    check_no_grad("newton_schulz", matrices)


def _check_scales(matrices: list[Tensor], dtype: torch.dtype, scales: Tensor) -> None:
    count = sum(x.shape[:-2].numel() for x in matrices)
    if scales.shape != (count,) or scales.dtype != torch.float32:
        raise ValueError(f"scales must be float32 of shape ({count},), got {scales.dtype} of {tuple(scales.shape)}")
    for x in matrices:
        if x.dtype != dtype:
            raise TypeError(f"with scales, matrices must be of the iteration's dtype, {dtype}, got {x.dtype}")


def _resolve(
    steps: tuple[Polynomial, ...], algorithm: str, restarts: str | Sequence[int], dtype: torch.dtype
) -> tuple[int, ...]:
    """The steps before which the Gram form restarts, all settings checked."""
    if algorithm not in ("auto", "gram", "standard"):
        raise ValueError(f"algorithm must be 'auto', 'gram' or 'standard', got {algorithm!r}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if isinstance(restarts, str):
        if restarts != "auto":
            raise ValueError(f"restarts must be 'auto' or steps, got {restarts!r}")
        return safe_restarts(steps, dtype)
    for t in restarts:
        if not isinstance(t, int) or not 1 <= t < len(steps):
            raise ValueError(f"restarts must be steps in 1 … {len(steps) - 1} (ns_steps - 1), got {t!r}")
    if algorithm == "standard" and len(restarts):
        raise ValueError(f"restarts belong to the Gram form, got {tuple(restarts)} with algorithm 'standard'")
    return tuple(sorted(set(restarts)))
