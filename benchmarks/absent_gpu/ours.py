"""Least bytes and operations of the ops of `prx_kernels`, where they are not "all inputs read, all outputs written"."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from benchmarks import tiles
from benchmarks.absent_gpu.launchers import Call
from benchmarks.roofline import Cost
from prx_kernels.blocks.modulation_kernels import chunks
from prx_kernels.launch import Config


def cost(func: Any, arguments: tuple[Any, ...], out: Any, calls: list[Call], default: float) -> Cost:
    """What an op costs at least, beside what its launches say.

    Args:
        default: bytes if every input is read once and every output written once.
    """
    name = func._schema.name.partition("::")[2]
    if name.startswith("sym_gemm"):
        return _symmetric(arguments, calls)
    flop = 0.0
    if func._overloadpacket in flop_registry:
        flop = float(flop_registry[func._overloadpacket](*arguments, out_val=out))
    rule = _BYTES.get(name)
    return Cost(default if rule is None else float(rule(*arguments)), flop)


def share(func: Any, arguments: tuple[Any, ...], calls: list[Call]) -> float | None:
    """Share of the matrix rate that a symmetric product's tiles allow by count (`benchmarks.tiles`), or None."""
    if not calls or calls[0].name != "_sym_gemm_tma_kernel":
        return None
    (call,) = calls
    sizes = tuple((name, call.constant(name)) for name in ("ROWS", "COLS", "DEPTH"))
    config = Config(sizes, call.options.num_warps, call.options.num_stages)
    batch, n, k = arguments[0].shape
    return tiles.efficiency(batch, n, k, config)


def _symmetric(arguments: tuple[Any, ...], calls: list[Call]) -> Cost:
    """Whole tiles of the upper triangle; C is read in that triangle, the result written whole."""
    a, b, c = arguments[:3]
    batch, n, k = a.shape
    nbytes = _size(a) + (0 if b is a else _size(b)) + batch * n * n * a.element_size()
    if c is not None:
        nbytes += batch * (n * (n + 1) // 2) * c.element_size()
    tiles = sum(call.grid[0] * call.constant("ROWS") * call.constant("COLS") for call in calls)
    return Cost(float(nbytes), 2.0 * tiles * k if calls else 2.0 * batch * n * n * k)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _rows(x: Tensor, keep: Tensor) -> int:
    """Bytes of the rows of x that `keep` names."""
    return _size(x) // max(x.shape[1], 1) * keep.shape[1]


def _qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor,
    txt_kv: Tensor | None, *_: Any,
) -> int:  # fmt: skip
    """Values are not read again, of which img_qkv holds a third and txt_kv half; the weights' gradients are nothing."""
    text = 0 if txt_kv is None else _size(txt_kv) // 2 + _size(txt_kv)
    return _size(grad_q) + _size(grad_k) + _size(grad_v) + _size(img_qkv) * 2 // 3 + _size(img_qkv) + _size(rope) + text


def _modulation_backward(
    grad_y: Tensor | None, grad_h: Tensor, again: Tensor | None, y: Tensor, branch: Tensor | None, modulation: Tensor,
    *_: Any,
) -> int:  # fmt: skip
    """Rows are read and written once, where there are some; float32 parts of the sums are written."""
    rows = 3 + (grad_y is not None) + (again is not None) + 2 * (branch is not None)
    return rows * _size(y) + chunks(*y.shape[:2])[1] * modulation.numel() * 4 + _size(modulation)


# Routing touches only the rows that move. Rows of y all lie in x's place; `keep` is read once.
_BYTES: dict[str, Callable[..., int]] = {
    "gather_tokens": lambda x, keep: 2 * _rows(x, keep) + _size(keep),
    "scatter_tokens": lambda x, y, keep: 2 * _size(x) + _size(keep),
    "spread_tokens": lambda y, keep, tokens: _size(y) + _size(y) // max(y.shape[1], 1) * tokens + _size(keep),
    "clear_tokens": lambda x, keep: 2 * _size(x) - _rows(x, keep) + _size(keep),
    "add_tokens": lambda x, y, keep: 2 * _size(x) + _size(y) + _size(keep),
    "clear_tokens_": lambda x, keep: _rows(x, keep) + _size(keep),
    "add_tokens_": lambda x, y, keep: 3 * _size(y) + _size(keep),
    # Muon: momentum and weights are read and written, updates and copies of weights are written only.
    "momentum_update": lambda grads, buffers, outs, *_: (
        sum(map(_size, grads)) + 2 * sum(map(_size, buffers)) + sum(map(_size, outs))
    ),
    "apply_update": lambda params, updates, copies, *_: (
        2 * sum(map(_size, params)) + sum(map(_size, updates)) + sum(map(_size, copies))
    ),
    "scaled_copy": lambda sources, outs, *_: sum(map(_size, sources)) + sum(map(_size, outs)),
    "residual_gate_norm_modulate_backward": _modulation_backward,
    "qk_norm_rope_backward": _qk_norm_rope_backward,
}
