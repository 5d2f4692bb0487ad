"""Attention of image queries over [text, image] keys, by three backends that skip padded text in different ways.

`sdpa` masks it with a (batch, 1, 1, keys) mask that is never expanded; `varlen` (torch.nn.attention.varlen) and
`flash` (the flash-attn package) pack the real keys behind one another, so that padding costs nothing in the product.
"""

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    """Softmax attention of image queries over text and image keys, scaled by 1/sqrt(head_dim).

    Args:
        query: (batch, heads, N, head_dim).
        key, value: (batch, heads, L + N, head_dim), text first.
        mask: (batch, L) bool, True at real text tokens; None where all are real. Padding on any side.
        backend: one of `BACKENDS`; see `check_backend`.

    Returns:
        (batch, heads, N, head_dim), dtype of the query.
    """
    batch, heads, tokens, head_dim = query.shape
    real = None if mask is None else F.pad(mask, (0, key.shape[2] - mask.shape[1]), value=True)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=real if real is None else real[:, None, None]
        )
    if real is not None:
        # Packed kernels leave the gradient of keys behind the last segment unwritten (empty_like): cut it off here.
        padding = ~real[:, None, :, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    packed_query = query.transpose(1, 2).reshape(batch * tokens, heads, head_dim)
    packed_key, packed_value, cu_keys = pack_keys(key, value, mask)
    out = attend_packed(packed_query, packed_key, packed_value, cu_keys, key.shape[2], backend)
    return out.unflatten(0, (batch, tokens)).transpose(1, 2)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, cu_keys: Tensor, longest: int, backend: Backend) -> Tensor:
    """Attention where each sample has its own number of keys, which lie behind one another without padding.

    Args:
        query: (batch·N, heads, head_dim), N for each sample.
        key, value: (rows, heads, head_dim).
        cu_keys: (batch + 1,) int32: sample i's keys are rows cu_keys[i] … cu_keys[i + 1] - 1.
        longest: at least the keys of any sample.
        backend: "varlen" or "flash".

    Returns:
        (batch·N, heads, head_dim).
    """
    rows, samples = query.shape[0], cu_keys.shape[0] - 1
    tokens = rows // samples
    cu_queries = torch.arange(0, rows + 1, tokens, dtype=torch.int32, device=query.device)
    kernel = _varlen if backend == "varlen" else _flash
    return kernel(query, key, value, cu_queries, cu_keys, tokens, longest)


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
