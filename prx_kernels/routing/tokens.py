"""Token routing (TREAD, https://arxiv.org/abs/2501.04765): half the tokens skip the middle blocks of a transformer.

`keep = sample_keep(...)`, `y, byp = enter_route(x, keep)`, blocks on y, `x = exit_route(y, byp, keep)`. Every op is
linear in its tensors and moves whole rows. Kept indices are unique in a row, so no gradient needs atomics; each op's
gradient is right for the op alone, and what a pair can share is left to the compiler (see `cleared`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import check_no_tangent, check_one_device, custom_op, on_cpu
from . import kernels, reference

MAX_TOKENS = kernels.MAX_TOKENS

# --- public ------------------------------------------------------------------------------------------------------


def sample_keep(sample_ids: Tensor, tokens: int, selection_ratio: float, *, seed: Tensor) -> Tensor:
    """Choose for every sample, uniformly at random, the tokens that go through the routed blocks.

    Counter-based (Philox 4x32-10 keyed on seed and sample id): the same set for a sample on every device, at every
    world size and on recomputation.

    Args:
        sample_ids: (batch,) int64 global sample ids.
        tokens: tokens a sample, N, 2 to 16,384.
        selection_ratio: share of tokens that *bypass* the blocks, in (0, 1).
        seed: int64 tensor with one element, on the device of sample_ids; mix step and purpose into it for a fresh set
            every forward. It is a tensor so that a new seed neither recompiles nor is baked into a CUDA graph.

    Returns:
        (batch, K) int32, sorted and unique in each row, `K = N - clamp(round(N·selection_ratio), 1, N-1)`.

    Raises:
        ValueError: N or the ratio is out of range, a shape does not fit, or seed is on another device.
        TypeError: seed or sample_ids is not int64.
    """
    kept = reference.kept_tokens(tokens, selection_ratio)
    if tokens > MAX_TOKENS:
        raise ValueError(f"sample_keep draws from at most {MAX_TOKENS} tokens, got {tokens}")
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or sample_ids.dtype != torch.int64:
        raise TypeError(
            f"seed and sample_ids must be int64 tensors, got {getattr(seed, 'dtype', type(seed).__name__)} and "
            f"{sample_ids.dtype}"
        )
    if sample_ids.ndim != 1 or seed.numel() != 1:
        raise ValueError(
            f"sample_ids must have shape (batch,) and seed one element, got {tuple(sample_ids.shape)} and "
            f"{tuple(seed.shape)}"
        )
    if seed.device != sample_ids.device:
        raise ValueError(f"seed must be on the device of sample_ids, {sample_ids.device}, got {seed.device}")
    return draw(sample_ids, seed, tokens, kept)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """Take rows `keep` of x. Also for rotary tables and REPA targets.

    Args:
        x: (batch, N, ...) of any dtype and strides.
        keep: (batch, K) int32 or int64.

    Returns:
        (batch, K, ...), dtype of x. An index outside 0 … N-1 is an IndexError on the CPU; on a GPU, where reading it
        would mean waiting, it gives rows of NaN.

    Raises:
        TypeError: keep is not int32 or int64.
        ValueError: keep does not fit x, or lies on another device.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_keep(x, keep)
    # A lazy conjugate or negative shares the memory of what it is not.
    y: Tensor = _gather(x.resolve_conj().resolve_neg(), keep)
    return y


def scatter_tokens(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """Put y (batch, K, ...) at rows `keep` (batch, K; unique in a row) of a copy of x (batch, N, ...), in one pass.

    The result has the common dtype of x and y (under autocast a block may return another one than it was given).

    Raises:
        TypeError: keep is not int32 or int64.
        ValueError: keep does not fit x, y does not fit both, or they lie on several devices.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_keep(x, keep)
    check_routed(x, y, keep)
    dtype = torch.promote_types(x.dtype, y.dtype)
    joined: Tensor = _scatter(x.to(dtype), y.to(dtype), keep)
    return joined


def enter_route(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Split tokens in front of the routed blocks.

    Args:
        x: (batch, N, C).
        keep: (batch, K) int32 or int64, unique in each row.

    Returns:
        `y` (batch, K, C), the kept tokens, and `byp`, a view of x without a copy, which `exit_route` completes.
        Handing on `byp` instead of x spares the backward a sum of two full gradients; gradients are right either way.

    Raises:
        TypeError: keep is not int32 or int64.
        ValueError: keep does not fit x, or lies on another device.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_keep(x, keep)
    y, byp = _EnterRoute.apply(x, keep)
    return y, byp


def exit_route(y: Tensor, byp: Tensor, keep: Tensor) -> Tensor:
    """Join tokens behind the routed blocks: rows `keep` from y (batch, K, C), the others from byp (batch, N, C).

    Raises:
        TypeError: keep is not int32 or int64.
        ValueError: keep does not fit byp, y does not fit both, or they lie on several devices.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    return scatter_tokens(byp, y, keep)


def draw(sample_ids: Tensor, seed: Tensor, tokens: int, kept: int) -> Tensor:
    """`sample_keep` by the number of kept tokens, arguments already checked."""
    keep: Tensor = _sample_keep(sample_ids, seed, tokens, kept)
    return keep


def check_keep(x: Tensor, keep: Tensor) -> None:
    check_no_tangent("token routing", x)
    check_one_device(x=x, keep=keep)
    if keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"keep must be int32 or int64, got {keep.dtype}")
    if keep.ndim != 2 or x.ndim < 2 or keep.shape[0] != x.shape[0] or not 0 < keep.shape[1] <= x.shape[1]:
        raise ValueError(
            f"keep must be (batch, K) with 0 < K <= tokens for x of shape {tuple(x.shape)}, got {tuple(keep.shape)}"
        )


def check_routed(x: Tensor, y: Tensor, keep: Tensor) -> None:
    check_no_tangent("token routing", y)
    check_one_device(x=x, y=y)
    expected = (*keep.shape, *x.shape[2:])
    if tuple(y.shape) != tuple(expected):
        raise ValueError(f"the routed tokens must have shape {expected} to go where keep says, got {tuple(y.shape)}")


class _EnterRoute(torch.autograd.Function):
    """Gather, and a view of x: an op's output may not alias its input, a Function's may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep)
        ctx.set_materialize_grads(False)
        ctx.tokens = x.shape[1]
        return _gather(x, keep), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_byp: Tensor | None) -> tuple[Tensor | None, None]:
        (keep,) = ctx.saved_tensors
        if grad_y is None or grad_byp is None:
            return (grad_byp if grad_y is None else _spread(grad_y, keep, ctx.tokens)), None
        return added(grad_byp, grad_y, keep), None


# --- gradients in one pass ---------------------------------------------------------------------------------------


def cleared(grad: Tensor, keep: Tensor) -> Tensor:
    """grad with zero at rows `keep`. An incoming gradient may be somebody else's, so eagerly the other rows are copied.

    The compiler sees who else reads it: it drops the clone where nobody does, and only the K rows are written.
    """
    if not _traced():
        cleared: Tensor = _clear(grad, keep)
        return cleared
    grad = grad.clone(memory_format=torch.contiguous_format)
    _clear_(grad, keep)
    return grad


def added(grad: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """grad + rows at `keep`; copied or updated as in `cleared`."""
    if not _traced():
        added: Tensor = _add(grad, rows, keep)
        return added
    grad = grad.clone(memory_format=torch.contiguous_format)
    _add_(grad, rows, keep)
    return grad


def _traced() -> bool:
    """Whether a compiler records this backward. torch 2.11 does not call it compiling where an op's backward is."""
    proxy = torch._C._TorchDispatchModeKey.PROXY
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(proxy) is not None


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("sample_keep")
def _sample_keep(sample_ids: Tensor, seed: Tensor, tokens: int, kept: int) -> Tensor:
    return kernels.sample_keep(sample_ids, seed, tokens, kept)


@on_cpu(_sample_keep)
def _(sample_ids: Tensor, seed: Tensor, tokens: int, kept: int) -> Tensor:
    return reference.smallest_keys(sample_ids, tokens, kept, seed=seed)


@_sample_keep.register_fake
def _(sample_ids: Tensor, seed: Tensor, tokens: int, kept: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], kept), dtype=torch.int32)


@custom_op("gather_tokens")
def _gather(x: Tensor, keep: Tensor) -> Tensor:
    return kernels.gather(x, keep)


@on_cpu(_gather)
def _(x: Tensor, keep: Tensor) -> Tensor:
    return reference.gather_tokens(x, checked_range(keep, x.shape[1]))


@_gather.register_fake
def _(x: Tensor, keep: Tensor) -> Tensor:
    return x.new_empty((*keep.shape, *x.shape[2:]))


@custom_op("scatter_tokens")
def _scatter(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return kernels.merge(x, y, keep, x.shape[1])


@on_cpu(_scatter)
def _(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return reference.scatter_tokens(x, y, checked_range(keep, x.shape[1])).contiguous()


@custom_op("spread_tokens")
def _spread(y: Tensor, keep: Tensor, tokens: int) -> Tensor:
    return kernels.merge(None, y, keep, tokens)


@on_cpu(_spread)
def _(y: Tensor, keep: Tensor, tokens: int) -> Tensor:
    return reference.scatter_tokens(y.new_zeros((y.shape[0], tokens, *y.shape[2:])), y, keep)


@_spread.register_fake
def _(y: Tensor, keep: Tensor, tokens: int) -> Tensor:
    return y.new_empty((y.shape[0], tokens, *y.shape[2:]))


@custom_op("clear_tokens")
def _clear(x: Tensor, keep: Tensor) -> Tensor:
    return kernels.merge(x, None, keep, x.shape[1])


@on_cpu(_clear)
def _(x: Tensor, keep: Tensor) -> Tensor:
    return reference.clear_tokens(x, keep).contiguous()


@custom_op("add_tokens")
def _add(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return kernels.merge(x, y, keep, x.shape[1], add=True)


@on_cpu(_add)
def _(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    return reference.add_tokens(x, y, keep).contiguous()


def _like_x(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


for _with_rows in (_scatter, _clear, _add):
    _with_rows.register_fake(_like_x)


@custom_op("clear_tokens_", mutates=("x",))
def _clear_(x: Tensor, keep: Tensor) -> None:
    kernels.update(x, None, keep)


@on_cpu(_clear_)
def _(x: Tensor, keep: Tensor) -> None:
    x.copy_(reference.clear_tokens(x, keep))


@custom_op("add_tokens_", mutates=("x",))
def _add_(x: Tensor, y: Tensor, keep: Tensor) -> None:
    kernels.update(x, y, keep)


@on_cpu(_add_)
def _(x: Tensor, y: Tensor, keep: Tensor) -> None:
    x.copy_(reference.add_tokens(x, y, keep))


for _in_place in (_clear_, _add_):
    _in_place.register_fake(lambda *_: None)


def checked_range(keep: Tensor, tokens: int) -> Tensor:
    low, high = keep.aminmax() if keep.numel() else (keep.new_zeros(()), keep.new_zeros(()))
    if low < 0 or high >= tokens:
        raise IndexError(f"keep holds index {int(low if low < 0 else high)}, outside the {tokens} tokens of x")
    return keep


# --- backward of each op -----------------------------------------------------------------------------------------


def _save_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep = next(i for i in reversed(inputs) if isinstance(i, Tensor))
    ctx.save_for_backward(keep)
    ctx.tokens = inputs[0].shape[1]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _spread(grad, ctx.saved_tensors[0], ctx.tokens), None


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _gather(grad, ctx.saved_tensors[0]), None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (keep,) = ctx.saved_tensors
    grad_y = _gather(grad, keep) if ctx.needs_input_grad[1] else None
    return (cleared(grad, keep) if ctx.needs_input_grad[0] else None), grad_y, None


def _clear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _clear(grad, ctx.saved_tensors[0]), None


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return grad, _gather(grad, ctx.saved_tensors[0]), None


_gather.register_autograd(_gather_backward, setup_context=_save_keep)
_spread.register_autograd(_spread_backward, setup_context=_save_keep)
_scatter.register_autograd(_scatter_backward, setup_context=_save_keep)
_clear.register_autograd(_clear_backward, setup_context=_save_keep)
_add.register_autograd(_add_backward, setup_context=_save_keep)
