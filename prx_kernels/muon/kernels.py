"""Triton kernels of Muon's two elementwise passes; the ops that use them stand in passes.py.

Each is one launch a matrix and moves the least bytes: with float32 state and a bf16 update 14 bytes an entry for the
momentum (`torch._foreach_*`: two lerps and a cast, 30) and 10 for the weights (two passes over them, 18 or 22).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, hint, jit, on_device, tl, tuned
from . import reference

# --- kernels -----------------------------------------------------------------------------------------------------


@jit
def _momentum_kernel(  # type: ignore[no-untyped-def]
    out_ptr, buffer_ptr, grad_ptr, size, weight,
    NESTEROV: tl.constexpr, HAS_OUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """buffer += weight·(grad - buffer); out = Nesterov's look-ahead of it. `weight` is 1 - momentum."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < hint(size, ALIGN)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    old = tl.load(buffer_ptr + at, mask=mask, other=0.0).to(tl.float32)
    new = old + weight * (grad - old)
    finite = tl.abs(new) < float("inf")  # false for NaN too
    tl.store(buffer_ptr + at, tl.where(finite, new, old).to(buffer_ptr.dtype.element_ty), mask=mask)
    if HAS_OUT:
        update = new
        if NESTEROV:
            update = new + weight * (grad - new)
        update = tl.where(finite, update, float("nan"))
        tl.store(out_ptr + at, update.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _apply_kernel(  # type: ignore[no-untyped-def]
    param_ptr, update_ptr, lr_ptr, size, ratio, weight_decay, ALIGN: tl.constexpr, BLOCK: tl.constexpr
):
    """param = param·(1 - lr·weight_decay) - lr·ratio·update, but where the update is not finite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < hint(size, ALIGN)
    lr = tl.load(lr_ptr).to(tl.float32)
    param = tl.load(param_ptr + at, mask=mask, other=0.0)
    update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
    new = param.to(tl.float32) * (1.0 - lr * weight_decay) - (lr * ratio) * update
    kept = tl.where(tl.abs(update) < float("inf"), new.to(param_ptr.dtype.element_ty), param)
    tl.store(param_ptr + at, kept, mask=mask)


# --- launcher ----------------------------------------------------------------------------------------------------

# Keyed on the bytes of an element: two 16-byte loads a thread and tensor of float32, one of bf16. Not yet tuned.
BLOCK: Table = {0: ((2, Config((("BLOCK", 2048),), num_warps=8)), (4, Config((("BLOCK", 2048),), num_warps=8)))}


def launch_momentum(
    grads: Sequence[Tensor], buffers: Sequence[Tensor], outs: Sequence[Tensor], momentum: float, nesterov: bool
) -> None:
    """Move every buffer towards its gradient; write what is to be orthogonalised to `outs`, if there are any."""
    for i, (grad, buffer) in enumerate(zip(grads, buffers, strict=True)):
        out = outs[i] if outs else buffer
        if not _plain(buffer, grad, out):
            new, update = reference.momentum_update(grad, buffer, momentum, nesterov=nesterov)
            buffer.copy_(new)
            if outs:
                out.copy_(update)
        elif buffer.numel():
            config = tuned(BLOCK, buffer.element_size(), buffer.device)
            with on_device(buffer):
                _momentum_kernel[_grid(buffer, config)](
                    out, buffer, grad, buffer.numel(), 1 - momentum,
                    NESTEROV=nesterov, HAS_OUT=len(outs) > 0, ALIGN=alignment(buffer.numel()), **config.options,
                )  # fmt: skip


def launch_apply(
    params: Sequence[Tensor], updates: Sequence[Tensor], ratios: Sequence[float], lr: Tensor, weight_decay: float
) -> None:
    """Decay every weight and take lr·ratio of its update off it; `lr` is one number on the device of the weights."""
    for param, update, ratio in zip(params, updates, ratios, strict=True):
        if param.is_contiguous() and not update.is_contiguous():
            update = update.contiguous()
        if not _plain(param, update):
            decayed = param * (1 - lr * weight_decay) - (lr * ratio) * update
            param.copy_(torch.where(update.isfinite(), decayed, param))
        elif param.numel():
            config = tuned(BLOCK, param.element_size(), param.device)
            with on_device(param):
                _apply_kernel[_grid(param, config)](
                    param, update, lr, param.numel(), ratio, weight_decay,
                    ALIGN=alignment(param.numel()), **config.options,
                )  # fmt: skip


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernels, which count in float32 and know no strides, may run; the definitions are as right."""
    return all(x.is_contiguous() and x.dtype != torch.float64 for x in tensors)


def _grid(x: Tensor, config: Config) -> tuple[Any]:
    return (-(-x.numel() // config.options["BLOCK"]),)
