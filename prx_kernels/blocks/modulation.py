"""The end of one half of a block and the beginning of the next: residual sum, gate, LayerNorm, adaLN modulation.

Forward moves what a compiler's kernels of the plain form move. The backward is one pass instead of three or four: it
forms the gradients of the rows and adds up those of gate, shift and scale on the way, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import check_no_tangent, check_one_device, custom_op, on_cpu
from . import modulation_kernels, reference

# --- public ------------------------------------------------------------------------------------------------------


def norm_modulate(x: Tensor, modulation: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x itself, and `h = LayerNorm(x)·(1 + scale) + shift` (adaLN, https://arxiv.org/abs/2212.09748).

    Go on with the x that is returned: its gradient and that of the norm are then added in the backward's one pass.

    Args:
        x: (batch, N, C) floating, C at most 8,192.
        modulation: (1 or batch, 2·C) floating, shift and scale beside one another as the projection of DiT's blocks
            gives them: `projection[:, : 2 * C]`, read in place.
        eps: of a LayerNorm without weight and bias.

    Returns:
        x, and h (batch, N, C) in its dtype; statistics and modulation in float32 (float64 for float64).

    There is no gradient to second order.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or device does not fit.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("norm_modulate", x, modulation)
    check_one_device(x=x, modulation=modulation)
    modulation = _checked(modulation, x, 2)
    if not _is_recorded(x, modulation):
        return x, _norm_modulate(x, modulation, eps)
    same, h = _NormModulate.apply(x, modulation, eps)
    return same, h


def residual_gate_norm_modulate(
    x: Tensor, branch: Tensor, modulation: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = x + gate·branch`, and `h = LayerNorm(y)·(1 + scale) + shift` (adaLN-zero, https://arxiv.org/abs/2212.09748).

    Args:
        x, branch: (batch, N, C) floating, C at most 8,192: the residual stream and a branch's output.
        modulation: (1 or batch, 3·C) floating: this branch's gate, the next one's shift and scale, beside one another
            as the projection of DiT's blocks gives them: `projection[:, 2 * C : 5 * C]`, read in place.
        eps: of a LayerNorm without weight and bias.

    Returns:
        y, and h twice, for the two products of a gated MLP: each (batch, N, C) in the common dtype of x and branch.
        The gradients of both are added in the backward's one pass; where there is one product, leave the second be.
        Sums, statistics and modulation in float32 (float64 for float64); y is rounded before it is normalised.

    There is no gradient to second order.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or device does not fit.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("residual_gate_norm_modulate", x, branch, modulation)
    check_one_device(x=x, branch=branch, modulation=modulation)
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    modulation, dtype = _checked(modulation, x, 3), torch.promote_types(x.dtype, branch.dtype)
    x, branch = x.to(dtype), branch.to(dtype)
    if not _is_recorded(x, branch, modulation):
        y, h = _residual_modulate(x, branch, modulation, eps)
        return y, h, h
    y, h, again = _ResidualModulate.apply(x, branch, modulation, eps)
    return y, h, again


def _checked(modulation: Tensor, x: Tensor, vectors: int) -> Tensor:
    """modulation as (batch, vectors·C)."""
    if not (x.is_floating_point() and modulation.is_floating_point()):
        raise TypeError(f"tokens and modulation must be floating, got {x.dtype} and {modulation.dtype}")
    fits = x.ndim == 3 and modulation.ndim == 2 and modulation.shape[0] in (1, x.shape[0])
    if not fits or modulation.shape[1] != vectors * x.shape[2]:
        raise ValueError(
            f"modulation must be (1 or batch, {vectors}·C) for tokens (batch, N, C) of shape {tuple(x.shape)}, "
            f"got {tuple(modulation.shape)}"
        )
    if x.shape[2] > modulation_kernels.MAX_WIDTH:
        raise ValueError(
            f"a row is kept in registers, {modulation_kernels.MAX_WIDTH} elements at most, got {x.shape[2]}"
        )
    return modulation.expand(x.shape[0], -1)


def _is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd needs a Function, which torch.func.vmap could not map."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, modulation)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return x.view_as(x), _norm_modulate(x, modulation, eps)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, modulation = ctx.saved_tensors
        if grad_h is None:
            return grad_x, None, None
        rows, _, parts = _backward(grad_x, grad_h, None, x, None, modulation, ctx.eps)
        return rows, parts.sum(1).to(modulation.dtype), None


class _ResidualModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, h = _residual_modulate(x, branch, modulation, eps)
        ctx.save_for_backward(y, branch, modulation)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, h, h.view_as(h)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, again: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, branch, modulation = ctx.saved_tensors
        grad_h, again = (again, None) if grad_h is None else (grad_h, again)
        grad_h = torch.zeros_like(y) if grad_h is None else grad_h
        rows, of_branch, parts = _backward(grad_y, grad_h, again, y, branch, modulation, ctx.eps)
        return rows, of_branch, parts.sum(1).to(modulation.dtype), None


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("norm_modulate")
def _norm_modulate(x: Tensor, modulation: Tensor, eps: float) -> Tensor:
    return modulation_kernels.forward(x, None, modulation, eps)[1]


@on_cpu(_norm_modulate)
def _(x: Tensor, modulation: Tensor, eps: float) -> Tensor:
    return reference.norm_modulate(x, modulation, eps=eps).contiguous()


@_norm_modulate.register_fake
def _(x: Tensor, modulation: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("residual_gate_norm_modulate")
def _residual_modulate(x: Tensor, branch: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return modulation_kernels.forward(x, branch, modulation, eps)


@on_cpu(_residual_modulate)
def _(x: Tensor, branch: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, h = reference.residual_gate_norm_modulate(x, branch, modulation, eps=eps)
    return y.contiguous(), h.contiguous()


@_residual_modulate.register_fake
def _(x: Tensor, branch: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@custom_op("residual_gate_norm_modulate_backward")
def _backward(
    grad_y: Tensor | None, grad_h: Tensor, again: Tensor | None, y: Tensor, branch: Tensor | None, modulation: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by x, by branch (empty without one), and (batch, parts, 2·C or 3·C) which are the modulation's in sum.

    The sum is left to torch: a compiler writes it where the whole projection's gradient comes together.
    """
    return modulation_kernels.backward(grad_y, grad_h, again, y, branch, modulation, eps)


@on_cpu(_backward)
def _(
    grad_y: Tensor | None, grad_h: Tensor, again: Tensor | None, y: Tensor, branch: Tensor | None, modulation: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, of_branch, of_modulation = reference.residual_gate_norm_modulate_backward(
        grad_y, grad_h, again, y, branch, modulation, eps=eps
    )
    parts = of_modulation.new_zeros(y.shape[0], modulation_kernels.chunks(*y.shape[:2])[1], modulation.shape[1])
    parts[:, :1] = of_modulation
    return rows.contiguous(), y.new_empty(0) if of_branch is None else of_branch.contiguous(), parts


@_backward.register_fake
def _(
    grad_y: Tensor | None, grad_h: Tensor, again: Tensor | None, y: Tensor, branch: Tensor | None, modulation: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = [y.shape[0], modulation_kernels.chunks(y.shape[0], y.shape[1])[1], modulation.shape[1]]
    parts = y.new_empty(shape, dtype=torch.float64 if y.dtype == torch.float64 else torch.float32)
    return y.new_empty(y.shape), y.new_empty([0] if branch is None else y.shape), parts
