"""Attention of image queries over [text, image] keys, by three backends that skip padded text in different ways.

`sdpa` masks it with a (batch, 1, 1, keys) mask that is never expanded; `varlen` (torch.nn.attention.varlen) and
`flash` (the flash-attn package) pack the real keys behind one another, so that padding costs nothing in the product.
"""

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_text import join_keys, unpack

Backend = Literal["sdpa", "varlen", "flash"]
BACKENDS: tuple[Backend, ...] = ("sdpa", "varlen", "flash")


def check_backend(backend: str, device: torch.device) -> None:
    """Raise a ValueError with one sentence where `backend` is unknown or cannot run on `device`."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend != "sdpa" and device.type != "cuda":
        raise ValueError(f"attention backend {backend!r} needs a CUDA device, this is {device.type!r}; use 'sdpa'")
    if backend == "varlen" and find_spec("torch.nn.attention.varlen") is None:
        raise ValueError(f"attention backend 'varlen' needs torch >= 2.10, this is {torch.__version__}; use 'sdpa'")
    if backend == "flash" and not _has_flash_attention():
        raise ValueError("attention backend 'flash' needs the package flash-attn (extra 'flash'); use 'sdpa'")


def _has_flash_attention() -> bool:
    """Whether flash-attn 2 is installed: flash-attn-4 makes a package of the same name without its functions."""
    return find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None


def attend(
    query: Tensor,
    image_kv: tuple[Tensor, Tensor],
    text_kv: tuple[Tensor, Tensor],
    mask: Tensor | None,
    backend: Backend,
    text_places: Tensor | None = None,
) -> Tensor:
    """Softmax attention of image queries over text and image keys, scaled by 1/sqrt(head_dim).

    Args:
        query: (batch, heads, N, head_dim).
        image_kv: keys and values of the image, each (batch, heads, N, head_dim).
        text_kv: keys and values of the text, each (batch, heads, L, head_dim); packed: (heads, rows, head_dim).
        mask: (batch, L) bool, True at real text tokens; None where all are real. Padding on any side.
        backend: one of `BACKENDS`; see `check_backend`.
        text_places: (rows,) int64 where the text is packed (`packed_text.PackedText`); the mask is needed then.

    Returns:
        (batch, heads, N, head_dim), dtype of the query.
    """
    if text_places is not None and mask is not None:
        if backend != "sdpa":
            return _attend_packed(query, image_kv, text_kv, mask, backend, text_places)
        # The kernel wants every sample's keys at one length: rows are moved, which costs less than projecting padding.
        text_k, text_v = (unpack(t.transpose(0, 1), text_places, *mask.shape).transpose(1, 2) for t in text_kv)
        text_kv = text_k, text_v
    if backend != "sdpa" and mask is not None:
        # Packed kernels leave the gradient of keys behind the last segment unwritten (empty_like): cut it off here.
        padding = ~mask[:, None, :, None]
        text_kv = text_kv[0].masked_fill(padding, 0.0), text_kv[1].masked_fill(padding, 0.0)
    key = torch.cat((text_kv[0], image_kv[0]), dim=2)
    value = torch.cat((text_kv[1], image_kv[1]), dim=2)
    if backend == "sdpa":
        joint = None
        if mask is not None:
            joint = F.pad(mask, (0, image_kv[0].shape[2]), value=True)[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=joint)
    packed_key, packed_value, cu_keys = pack_keys(key, value, mask)
    return _by_segments(query, packed_key, packed_value, cu_keys, key.shape[2], backend)


def _attend_packed(
    query: Tensor,
    image_kv: tuple[Tensor, Tensor],
    text_kv: tuple[Tensor, Tensor],
    mask: Tensor,
    backend: Backend,
    places: Tensor,
) -> Tensor:
    """`attend` where the text is packed and the kernel takes packed keys: padding is never made."""
    parts = zip(text_kv, image_kv, strict=True)
    (key, cu_keys), (value, _) = (
        join_keys(text.transpose(0, 1), image.transpose(1, 2), places, mask) for text, image in parts
    )
    return _by_segments(query, key, value, cu_keys, mask.shape[1] + query.shape[2], backend)


def _by_segments(query: Tensor, key: Tensor, value: Tensor, cu_keys: Tensor, longest: int, backend: Backend) -> Tensor:
    """Attention of (batch, heads, N, head_dim) queries over packed (rows, heads, head_dim) keys and values."""
    batch, heads, tokens, head_dim = query.shape
    cu_queries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    packed_query = query.transpose(1, 2).reshape(batch * tokens, heads, head_dim)
    kernel = _varlen if backend == "varlen" else _flash
    out = kernel(packed_query, key, value, cu_queries, cu_keys, tokens, longest)
    return out.reshape(batch, tokens, heads, head_dim).transpose(1, 2)


def pack_keys(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Move real keys and values to the front, sample after sample, without a host synchronisation.

    The buffers keep their full length (its last part is unused), so no shape depends on the mask's content.

    Args:
        key, value: (batch, heads, L + N, head_dim), text first.
        mask: (batch, L) bool or None.

    Returns:
        key and value as (batch·(L+N), heads, head_dim), and the int32 cumulative lengths (batch + 1,).
    """
    batch, heads, length, head_dim = key.shape
    flat = (t.transpose(1, 2).reshape(batch * length, heads, head_dim) for t in (key, value))
    if mask is None:
        cumulative = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=key.device)
        return next(flat), next(flat), cumulative
    real = F.pad(mask, (0, length - mask.shape[1]), value=True)
    order = torch.argsort(~real.flatten(), stable=True)
    cumulative = F.pad(real.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
    return next(flat)[order], next(flat)[order], cumulative


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k)
    assert isinstance(out, Tensor)
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k)
    return out
