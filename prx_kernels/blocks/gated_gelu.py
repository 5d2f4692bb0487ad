"""The gated GELU between the products of an MLP: one pass forward, one backward.

It is for code that runs eagerly: a compiler's kernels of the plain form move as little (docs/kernels.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..launch import (
    Config,
    Table,
    alignment,
    check_no_tangent,
    check_one_device,
    custom_op,
    hint,
    jit,
    on_cpu,
    on_device,
    tl,
    tuned,
)
from . import reference
from .launch import accumulator, dense_rows

# --- public ------------------------------------------------------------------------------------------------------


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """`GELU(gate)·up` (GEGLU, https://arxiv.org/abs/2002.05202).

    Args:
        gate: (…, C) floating; halves of one projection are read in place.
        up: as gate, in shape and dtype.
        approximate: "tanh" or "none", as in torch.nn.functional.gelu.

    Returns:
        (…, C) dense, in the dtype of gate; formed in float32 (float64 for float64) and rounded once.

    Backward reads gate, up and the incoming gradient, and keeps nothing else. There is no gradient to second order.

    Raises:
        TypeError: gate is not floating, or up has another dtype.
        ValueError: shapes or devices differ, or shapes have no dimension, or approximate is neither.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("geglu", gate, up)
    check_one_device(gate=gate, up=up)
    if not gate.is_floating_point() or up.dtype != gate.dtype:
        raise TypeError(f"gate and up must be floating and of one dtype, got {gate.dtype} and {up.dtype}")
    if gate.ndim == 0 or up.shape != gate.shape:
        raise ValueError(f"gate and up must be (…, C), got {tuple(gate.shape)} and {tuple(up.shape)}")
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', got {approximate!r}")
    out: Tensor = _geglu(gate, up, approximate)
    return out


# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _gelu(gate, TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of `gate` that GELU lets through, and the derivative of GELU."""
    square = gate * gate
    if TANH:
        # 0.5·(1 + tanh(z)) is the sigmoid of 2·z, z = sqrt(2/π)·(gate + 0.044715·gate³). No 1 - share, which cancels.
        small = tl.exp(-1.5957691216057308 * tl.abs(gate) * (1 + 0.044715 * square))
        inverse = 1 / (1 + small)
        share = tl.where(gate < 0, small, 1.0) * inverse
        slope = 1.5957691216057308 * (1 + 0.134145 * square)
        derivative = share + gate * small * inverse * inverse * slope
    else:
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        derivative = share + gate * tl.exp(-0.5 * square) * 0.3989422804014327
    return share, derivative


@jit
def _geglu_kernel(  # type: ignore[no-untyped-def]
    out_ptr, gate_ptr, up_ptr, blocks, width, gate_row, up_row, TANH: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COLS numbers of a row a program."""
    width = hint(width, ALIGN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = cols < width
    gate = tl.load(gate_ptr + row * hint(gate_row, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * hint(up_row, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    share, _ = _gelu(gate, TANH)
    tl.store(out_ptr + row * width + cols, (gate * share * up).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _geglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, blocks, width, grad_row, gate_row, up_row,
    TANH: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """COLS numbers of a row a program."""
    width = hint(width, ALIGN)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = cols < width
    grad = tl.load(grad_ptr + row * hint(grad_row, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + row * hint(gate_row, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + row * hint(up_row, ALIGN) + cols, mask=mask, other=0.0).to(ACC)
    share, derivative = _gelu(gate, TANH)
    place = row * width + cols
    tl.store(grad_gate_ptr + place, (grad * up * derivative).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + place, (grad * gate * share).to(grad_up_ptr.dtype.element_ty), mask=mask)


# --- launchers ---------------------------------------------------------------------------------------------------

# For any width: 8 elements a thread, one 16-byte access in bf16. Not yet tuned on a GPU.
TILE: Table = {0: ((2**63 - 1, Config((("COLS", 1024),), num_warps=4)),)}


def launch_geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_geglu_kernel, (out,), (gate, up), approximate)
    return out


def launch_geglu_backward(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _launch(_geglu_backward_kernel, (grad_gate, grad_up), (grad, gate, up), approximate)
    return grad_gate, grad_up


def _launch(kernel: Any, outs: tuple[Tensor, ...], ins: tuple[Tensor, ...], approximate: str) -> None:
    x = outs[0]
    if not x.numel():
        return
    if all(given.is_contiguous() for given in ins):  # one long row: no program is left half empty
        rows, width, strides = 1, x.numel(), [0] * len(ins)
    else:
        width = x.shape[-1]
        rows, ins = x.numel() // width, tuple(dense_rows(given.reshape(-1, width)) for given in ins)
        strides = [given.stride(0) for given in ins]
    config = tuned(TILE, width, x.device).options
    blocks = -(-width // config["COLS"])
    with on_device(x):
        kernel[(rows * blocks,)](
            *outs, *ins, blocks, width, *strides, TANH=approximate == "tanh", ALIGN=alignment(width, *strides),
            ACC=accumulator(x), **config,
        )  # fmt: skip


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("geglu")
def _geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return launch_geglu(gate, up, approximate)


@on_cpu(_geglu)
def _(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return reference.geglu(gate, up, approximate=approximate).contiguous()


@_geglu.register_fake
def _(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op("geglu_backward")
def _backward(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Gradients by gate and by up."""
    return launch_geglu_backward(grad, gate, up, approximate)


@on_cpu(_backward)
def _(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    of_gate, of_up = reference.geglu_backward(grad, gate, up, approximate=approximate)
    return of_gate.contiguous(), of_up.contiguous()


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.approximate = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    of_gate, of_up = _backward(grad, *ctx.saved_tensors, ctx.approximate)
    return of_gate, of_up, None


_geglu.register_autograd(_gradients, setup_context=_save)
