"""From the projections' outputs to what attention reads, in one pass: q/k norm, rotary positions, text before image.

The backward is one pass too, and a small second one that adds the norm weights' gradients in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import check_no_tangent, check_one_device, custom_op, on_cpu
from . import launch, reference

# --- public ------------------------------------------------------------------------------------------------------


def qk_norm_rope(
    img_qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    txt_kv: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    *,
    txt_offsets: Tensor | None = None,
    txt_length: int | None = None,
    packed_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm and rotary positions of queries and keys, and text keys and values placed before those of the image.

    Drop-in for a block with one joint projection, for which text is left out::

        q, k, v = qk_norm_rope(self.qkv(x), self.q_norm.weight, self.k_norm.weight, rope)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    Args:
        img_qkv: (batch, N, 3·heads·D) floating: queries, keys, values, each head after head. Any strides with dense
            rows; D even, 256 at most, and read from the weights.
        q_weight, k_weight: (D,), scales of the norms `x / sqrt(mean(x²) + eps)·weight` over a head
            (https://arxiv.org/abs/1910.07467).
        rope: (1 or batch, N, D/2, 2) float32, cosine and sine of each neighbouring pair of features
            (https://arxiv.org/abs/2104.09864); gathered rows where tokens are routed. It gets no gradient.
        txt_kv: keys and values of text, which have no positions: (batch, T, 2·heads·D), T may be 0; packed
            (rows, 2·heads·D). dtype of img_qkv.
        txt_k_weight: (D,), needed with txt_kv.
        txt_offsets: (batch + 1,) int32 where the text is packed: sample i is rows offsets[i] … offsets[i + 1] - 1.
            Rows behind the last have no place, and gradient zero.
        txt_length: T, needed with txt_offsets: places behind a sample's text are zero. Of a longer text the rest is
            left out. Not given with packed_keys.
        packed_keys: give what variable-length attention reads.

    Returns:
        q (batch, heads, N, D), k and v (batch, heads, T + N, D), text first: views of (batch, tokens, heads, D), so
        that attention's output is in the order of the next product. dtype of img_qkv; norm and rotation in float32
        (float64 for float64), rounded once. With packed_keys q (batch·N, heads, D), k and v
        (rows + batch·N, heads, D), sample i from `offsets[i] + i·N` on; what stands behind the last is zero.

    There is no gradient to second order.

    Raises:
        TypeError: dtypes that differ or are not floating, or offsets that are not int32.
        ValueError: shapes or devices that do not fit, a table that asks for a gradient, arguments that need
            one another.
        NotImplementedError: a forward-mode derivative is asked for, or one of torch.func.
    """
    check_no_tangent("qk_norm_rope", img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight)
    check_one_device(
        img_qkv=img_qkv, q_weight=q_weight, k_weight=k_weight, rope=rope,
        txt_kv=txt_kv, txt_k_weight=txt_k_weight, txt_offsets=txt_offsets,
    )  # fmt: skip
    _check(img_qkv, q_weight, k_weight, rope)
    if txt_kv is not None:
        _check_text(img_qkv, q_weight, txt_kv, txt_k_weight, txt_offsets, txt_length, packed_keys)
    elif txt_offsets is not None or txt_length is not None or txt_k_weight is not None or packed_keys:
        raise ValueError(
            "txt_k_weight, txt_offsets, txt_length and packed_keys go with txt_kv; give it or leave them out"
        )
    q, k, v = _qk_norm_rope(
        img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets, txt_length or 0, packed_keys, eps
    )
    return (q.flatten(0, 1), k, v) if packed_keys else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _check(img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> None:
    if q_weight.ndim != 1 or k_weight.shape != q_weight.shape or q_weight.shape[0] % 2 or q_weight.shape[0] < 2:
        raise ValueError(
            f"q_weight and k_weight must be (D,) with D even, got {tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        )
    head_dim = q_weight.shape[0]
    if head_dim > launch.MAX_HEAD_DIM:
        raise ValueError(f"a head must have at most {launch.MAX_HEAD_DIM} features, got {head_dim}")
    if not (img_qkv.is_floating_point() and q_weight.is_floating_point() and rope.is_floating_point()):
        raise TypeError(
            f"img_qkv, weights and rope must be floating, got {img_qkv.dtype}, {q_weight.dtype} and {rope.dtype}"
        )
    if img_qkv.ndim != 3 or img_qkv.shape[2] == 0 or img_qkv.shape[2] % (3 * head_dim):
        raise ValueError(f"img_qkv must be (batch, N, 3·heads·{head_dim}), got {tuple(img_qkv.shape)}")
    batch, tokens = img_qkv.shape[:2]
    if rope.ndim != 4 or rope.shape[0] not in (1, batch) or rope.shape[1:] != (tokens, head_dim // 2, 2):
        raise ValueError(
            f"rope must be (1 or {batch}, {tokens}, {head_dim // 2}, 2) for img_qkv {tuple(img_qkv.shape)}, "
            f"got {tuple(rope.shape)}"
        )
    if rope.requires_grad:
        raise ValueError("rope gets no gradient and asks for one: detach it")


def _check_text(
    img_qkv: Tensor, q_weight: Tensor, txt_kv: Tensor, txt_k_weight: Tensor | None, txt_offsets: Tensor | None,
    txt_length: int | None, packed_keys: bool,
) -> None:  # fmt: skip
    if txt_kv.dtype != img_qkv.dtype:
        raise TypeError(f"txt_kv must have the dtype of img_qkv, got {txt_kv.dtype} and {img_qkv.dtype}")
    if txt_k_weight is None or txt_k_weight.shape != q_weight.shape:
        given = None if txt_k_weight is None else tuple(txt_k_weight.shape)
        raise ValueError(f"txt_k_weight must be {tuple(q_weight.shape)} where there is text, got {given}")
    batch, width = img_qkv.shape[0], img_qkv.shape[2] // 3 * 2
    if txt_offsets is None:
        if txt_kv.ndim != 3 or txt_kv.shape[0] != batch or txt_kv.shape[2] != width:
            raise ValueError(f"txt_kv must be ({batch}, T, {width}), got {tuple(txt_kv.shape)}")
        if packed_keys or txt_length is not None:
            raise ValueError("packed_keys and txt_length go with packed text: give txt_offsets, or leave them out")
        return
    if txt_kv.ndim != 2 or txt_kv.shape[1] != width:
        raise ValueError(f"txt_kv with txt_offsets must be (rows, {width}), got {tuple(txt_kv.shape)}")
    if txt_offsets.dtype != torch.int32:
        raise TypeError(f"txt_offsets must be int32, got {txt_offsets.dtype}")
    if tuple(txt_offsets.shape) != (batch + 1,):
        raise ValueError(f"txt_offsets must be ({batch + 1},), got {tuple(txt_offsets.shape)}")
    if packed_keys == (txt_length is not None) or (txt_length is not None and txt_length < 0):
        raise ValueError(f"packed text needs txt_length from 0 on, or packed_keys and none, got {txt_length}")


# --- ops ---------------------------------------------------------------------------------------------------------


@custom_op("qk_norm_rope")
def _qk_norm_rope(
    img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, txt_kv: Tensor | None,
    txt_k_weight: Tensor | None, txt_offsets: Tensor | None, txt_length: int, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.forward(
        img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets, txt_length, packed_keys, eps
    )


@on_cpu(_qk_norm_rope)
def _(
    img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, txt_kv: Tensor | None,
    txt_k_weight: Tensor | None, txt_offsets: Tensor | None, txt_length: int, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = reference.qk_norm_rope(
        img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets, txt_length,
        packed_keys=packed_keys, eps=eps,
    )  # fmt: skip
    # Without text the values are a view of the input.
    return q.contiguous(), k.contiguous(), v.clone(memory_format=torch.contiguous_format) if txt_kv is None else v


@_qk_norm_rope.register_fake
def _(
    img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, txt_kv: Tensor | None,
    txt_k_weight: Tensor | None, txt_offsets: Tensor | None, txt_length: int, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, tokens), head_dim = img_qkv.shape[:2], q_weight.shape[0]
    heads = img_qkv.shape[2] // (3 * head_dim)
    if packed_keys and txt_kv is not None:
        shape = [txt_kv.shape[0] + batch * tokens, heads, head_dim]
    else:
        length = 0 if txt_kv is None else txt_kv.shape[1] if txt_offsets is None else txt_length
        shape = [batch, length + tokens, heads, head_dim]
    return img_qkv.new_empty([batch, tokens, heads, head_dim]), img_qkv.new_empty(shape), img_qkv.new_empty(shape)


@custom_op("qk_norm_rope_backward")
def _backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor,
    txt_kv: Tensor | None, txt_k_weight: Tensor | None, txt_offsets: Tensor | None, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by img_qkv and txt_kv (empty without text), and (3, D) by the weights of q, k and text k."""
    return launch.backward(
        grad_q, grad_k, grad_v, img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets, packed_keys, eps
    )


@on_cpu(_backward)
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor,
    txt_kv: Tensor | None, txt_k_weight: Tensor | None, txt_offsets: Tensor | None, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_img, of_q, of_k, grad_txt, of_txt = reference.qk_norm_rope_backward(
        grad_q, grad_k, grad_v, img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets,
        packed_keys=packed_keys, eps=eps,
    )  # fmt: skip
    if grad_txt is None or of_txt is None:
        grad_txt, of_txt = img_qkv.new_empty(0), torch.zeros_like(of_q)
    return (
        grad_img,
        grad_txt,
        torch.stack((of_q, of_k, of_txt)).to(launch.common_dtype(q_weight, k_weight, txt_k_weight)),
    )


@_backward.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor,
    txt_kv: Tensor | None, txt_k_weight: Tensor | None, txt_offsets: Tensor | None, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_txt = img_qkv.new_empty([0] if txt_kv is None else txt_kv.shape)
    dtype = launch.common_dtype(q_weight, k_weight, txt_k_weight)
    return img_qkv.new_empty(img_qkv.shape), grad_txt, q_weight.new_empty([3, q_weight.shape[0]], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.packed_keys, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets = ctx.saved_tensors
    grad_img, grad_txt, of_weights = _backward(
        grad_q, grad_k, grad_v, img_qkv, q_weight, k_weight, rope, txt_kv, txt_k_weight, txt_offsets,
        ctx.packed_keys, ctx.eps,
    )  # fmt: skip
    of_q, of_k, of_txt = of_weights.unbind()
    text = (None, None) if txt_kv is None else (grad_txt, of_txt.to(txt_k_weight.dtype))
    return grad_img, of_q.to(q_weight.dtype), of_k.to(k_weight.dtype), None, *text, None, None, None, None


_qk_norm_rope.register_autograd(_gradients, setup_context=_save)
