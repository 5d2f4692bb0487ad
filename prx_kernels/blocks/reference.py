"""Plain-PyTorch definition of what stands between the matrix products of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import widened

# --- q/k norm, rotary positions, text before image -----------------------------------------------------------------


def qk_norm_rope(
    img_qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    txt_kv: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    txt_offsets: Tensor | None = None,
    txt_length: int = 0,
    *,
    packed_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (batch, N, heads, D); keys and values (batch, T + N, heads, D), text first, or packed.

    Arguments as those of `prx_kernels.qk_norm_rope`. Norm and rotation in float32 (float64 for float64), one rounding.
    """
    q, k, v = _heads(img_qkv, 3, q_weight)
    q, k = (rotate_pairs(rms_norm(x, w, eps), rope).to(v.dtype) for x, w in ((q, q_weight), (k, k_weight)))
    if txt_kv is None or txt_k_weight is None:
        return q, k, v
    txt_k, txt_v = _heads(txt_kv, 2, q_weight)
    txt_k = rms_norm(txt_k, txt_k_weight, eps).to(v.dtype)
    if txt_offsets is not None and packed_keys:
        return q, joined_rows(txt_k, k, txt_offsets), joined_rows(txt_v, v, txt_offsets)
    if txt_offsets is not None:
        txt_k, txt_v = (padded_rows(x, txt_offsets, txt_length) for x in (txt_k, txt_v))
    return q, torch.cat((txt_k, k), dim=1), torch.cat((txt_v, v), dim=1)


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    img_qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor,
    txt_kv: Tensor | None = None,
    txt_k_weight: Tensor | None = None,
    txt_offsets: Tensor | None = None,
    *,
    packed_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of `qk_norm_rope` by img_qkv, both weights, txt_kv and its weight; rows without a place get zero."""
    batch, tokens = img_qkv.shape[:2]
    if txt_offsets is not None and packed_keys:
        end = (txt_offsets[1:] + tokens * torch.arange(batch, device=rope.device))[:, None]
        image = end + torch.arange(tokens, device=rope.device)
        img_k, img_v = grad_k[image], grad_v[image]
    else:
        img_k, img_v = grad_k[:, grad_k.shape[1] - tokens :], grad_v[:, grad_k.shape[1] - tokens :]
    back = rope * rope.new_tensor((1.0, -1.0))  # the inverse of a rotation is that by the negative angle
    q, k, _ = _heads(img_qkv, 3, q_weight)
    dq, dq_weight = rms_norm_backward(rotate_pairs(grad_q, back), q, q_weight, eps)
    dk, dk_weight = rms_norm_backward(rotate_pairs(img_k, back), k, k_weight, eps)
    grad_img = torch.stack([x.to(img_qkv.dtype) for x in (dq, dk, img_v)], dim=2).flatten(2)
    if txt_kv is None or txt_k_weight is None:
        return grad_img, dq_weight, dk_weight, None, None
    txt_k = _heads(txt_kv, 2, q_weight)[0]
    if txt_offsets is None:
        grads = grad_k[:, : txt_kv.shape[1]], grad_v[:, : txt_kv.shape[1]]
    elif packed_keys:
        at = torch.arange(txt_kv.shape[0], device=rope.device)
        sample = torch.searchsorted(txt_offsets[1:].contiguous(), at, right=True)
        # Attention need not write the gradient of keys that no sample has: what stands there may be anything.
        none = (sample == batch)[:, None, None]
        grads = tuple(x[at + sample * tokens].masked_fill(none, 0.0) for x in (grad_k, grad_v))  # type: ignore[assignment]
    else:
        length = grad_k.shape[1] - tokens
        grads = tuple(rows_of(x[:, :length], txt_offsets, txt_kv.shape[0]) for x in (grad_k, grad_v))  # type: ignore[assignment]
    dtxt_k, dtxt_weight = rms_norm_backward(grads[0], txt_k, txt_k_weight, eps)
    grad_txt = torch.stack((dtxt_k.to(txt_kv.dtype), grads[1].to(txt_kv.dtype)), dim=-3).flatten(-3)
    return grad_img, dq_weight, dk_weight, grad_txt, dtxt_weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension (https://arxiv.org/abs/1910.07467), float32 or 64."""
    wide = widened(x)
    return F.rms_norm(wide, x.shape[-1:], weight.to(wide.dtype), eps)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` by x and by weight, of which the second is summed over all other dimensions."""
    grad, wide = widened(grad), widened(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    products = grad * normed
    scaled = products * weight.to(wide.dtype)
    rows = rstd * (grad * weight.to(wide.dtype) - normed * scaled.mean(-1, keepdim=True))
    return rows, products.flatten(0, -2).sum(0)


def rotate_pairs(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring feature pairs of x (batch, N, heads, D) by rope (1 or batch, N, D/2, 2): cosine, sine."""
    cos, sin = rope[:, :, None, :, 0], rope[:, :, None, :, 1]
    even, odd = widened(x).reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)


def padded_rows(rows: Tensor, offsets: Tensor, length: int) -> Tensor:
    """(rows, …), sample i at rows offsets[i] … offsets[i + 1] - 1, as (batch, length, …), zeros behind the last."""
    at = offsets[:-1, None] + torch.arange(length, device=rows.device)
    at = at.where(at < offsets[1:, None], rows.shape[0])
    return torch.cat((rows, torch.zeros_like(rows[:1]) if len(rows) else rows.new_zeros(1, *rows.shape[1:])))[at]


def rows_of(padded: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """The gradient of `padded_rows`: (batch, length, …) -> (rows, …), zeros in rows of no sample."""
    batch, length = padded.shape[:2]
    at = torch.arange(rows, device=padded.device)
    sample = torch.searchsorted(offsets[1:].contiguous(), at, right=True)
    place = sample * length + at - offsets[sample]
    flat = torch.cat((padded.flatten(0, 1), padded.new_zeros(1, *padded.shape[2:])))
    return flat[place.where((sample < batch) & (at - offsets[sample] < length), batch * length)]


def joined_rows(text: Tensor, image: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's text rows, then its image's: (rows + batch·N, …); rows of no sample last, as zeros."""
    batch, tokens = image.shape[:2]
    at = torch.arange(text.shape[0], device=text.device)
    sample = torch.searchsorted(offsets[1:].contiguous(), at, right=True)
    to_image = (offsets[1:] + tokens * torch.arange(batch, device=text.device))[:, None]
    to_image = to_image + torch.arange(tokens, device=text.device)
    text = text.masked_fill((sample == batch).view(-1, *[1] * (text.ndim - 1)), 0.0)
    source = torch.cat((text, image.flatten(0, 1)))
    return torch.zeros_like(source).index_copy(0, torch.cat((at + sample * tokens, to_image.flatten())), source)


def _heads(x: Tensor, parts: int, weight: Tensor) -> tuple[Tensor, ...]:
    """(…, parts·heads·D) -> `parts` views (…, heads, D)."""
    head_dim = weight.shape[0]
    return x.reshape(*x.shape[:-1], parts, x.shape[-1] // (parts * head_dim), head_dim).unbind(-3)


# --- residual, gate, LayerNorm, modulation ---------------------------------------------------------------------------


def norm_modulate(x: Tensor, modulation: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`LayerNorm(x)·(1 + scale) + shift` of x (batch, N, C); modulation (batch, 2·C) is shift and scale.

    Statistics and modulation in float32 (float64 for float64), rounded once to the dtype of x.
    """
    shift, scale = modulation.to(widened(x).dtype)[:, None].chunk(2, dim=-1)
    return (F.layer_norm(widened(x), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def residual_gate_norm_modulate(
    x: Tensor, branch: Tensor, modulation: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The sum y = x + gate·branch in the dtype of x, and `norm_modulate` of it; modulation is gate, shift and scale."""
    width = x.shape[-1]
    gate = modulation[:, None, :width].to(widened(x).dtype)
    y = (widened(x) + gate * widened(branch)).to(x.dtype)
    return y, norm_modulate(y, modulation[:, width:], eps=eps)


def residual_gate_norm_modulate_backward(
    grad_y: Tensor | None,
    grad_h: Tensor,
    again: Tensor | None,
    y: Tensor,
    branch: Tensor | None,
    modulation: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients by x, by branch if there is one, and (batch, 1, 2·C or 3·C) by the modulation, not rounded.

    grad_y is the gradient of the sum y by other ways, if there are some. Without a branch y is x, which passes through.
    Where two products read the modulated norm, its gradient is the sum of grad_h and again.
    """
    wide, grad = widened(y), widened(grad_h) if again is None else widened(grad_h) + widened(again)
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd
    width = y.shape[-1]
    scaled = grad * (1 + modulation.to(wide.dtype)[:, None, -width:])
    inner = scaled.mean(-1, keepdim=True) + normed * (scaled * normed).mean(-1, keepdim=True)
    total = rstd * (scaled - inner) + (0.0 if grad_y is None else widened(grad_y))
    of_vectors = [grad.sum(1), (grad * normed).sum(1)]
    grad_branch = None
    if branch is not None:
        grad_branch = (total * modulation.to(wide.dtype)[:, None, :width]).to(branch.dtype)
        of_vectors = [(total * widened(branch)).sum(1), *of_vectors]
    return total.to(y.dtype), grad_branch, torch.cat(of_vectors, dim=1)[:, None]


# --- gated GELU --------------------------------------------------------------------------------------------------


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """`GELU(gate)·up`, formed in float32 (float64 for float64) and rounded once to the dtype of gate."""
    return (F.gelu(widened(gate), approximate=approximate) * widened(up)).to(gate.dtype)


def geglu_backward(grad: Tensor, gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> tuple[Tensor, Tensor]:
    """Gradients of `geglu` by gate and by up."""
    wide = widened(gate)
    of_up = widened(grad) * F.gelu(wide, approximate=approximate)
    of_gate = torch.ops.aten.gelu_backward(widened(grad) * widened(up), wide, approximate=approximate)
    return of_gate.to(gate.dtype), of_up.to(gate.dtype)
