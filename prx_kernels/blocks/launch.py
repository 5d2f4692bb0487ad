"""How the kernels of kernels.py are launched: their tables, grids and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import Config, Table, alignment, on_device, tl, tuned
from . import kernels

# Keyed on D rounded up to a power of two: 2,048 numbers of one tensor a program, two 16-byte accesses of a thread in
# bf16, in the backward one (with 4 warps it has 199 registers, and few programs beside one another). Not yet tuned.
_TILES = tuple((width, (("WIDTH", width), ("HEADS", 2048 // width))) for width in (32, 64, 128, 256))
FORWARD: Table = {0: tuple((width, Config(tile, num_warps=4)) for width, tile in _TILES)}
# Float32 with 8 heads of 256 spills.
_WIDE = (256, Config((("WIDTH", 256), ("HEADS", 4)), num_warps=4))
BACKWARD: Table = {0: (*((width, Config(tile, num_warps=8)) for width, tile in _TILES[:-1]), _WIDE)}
SUM: Table = {0: ((2**31, Config((("COLS", 8), ("ROWS", 256)), num_warps=8)),)}
MAX_HEAD_DIM = FORWARD[0][-1][0]
_MOST_PROGRAMS = 1024  # of the backward: rows of partial sums, whose traffic is then under 1 MB
_NONE, _PADDED, _PACKED, _PACKED_KEYS = range(4)  # the kernels' TEXT


def forward(
    img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, txt_kv: Tensor | None,
    txt_k_weight: Tensor | None, txt_offsets: Tensor | None, txt_length: int, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values as `reference.qk_norm_rope` gives them, each dense."""
    head_dim = q_weight.shape[0]
    batch, tokens, heads = *img_qkv.shape[:2], img_qkv.shape[2] // (3 * head_dim)
    text, length, rows = _text(batch, txt_kv, txt_offsets, txt_length, packed_keys)
    q = torch.empty((batch, tokens, heads, head_dim), dtype=img_qkv.dtype, device=img_qkv.device)
    shape = (rows + batch * tokens,) if text == _PACKED_KEYS else (batch, length + tokens)
    k, v = (torch.empty((*shape, heads, head_dim), dtype=img_qkv.dtype, device=img_qkv.device) for _ in range(2))
    config = _tile(FORWARD, heads, head_dim, img_qkv)
    text_programs = rows if text == _PACKED_KEYS else batch * length
    if k.numel():
        img, txt, weights, rope, strides = _inputs(img_qkv, txt_kv, (q_weight, k_weight, txt_k_weight), rope)
        with on_device(img):
            kernels._forward_kernel[(text_programs + batch * tokens, -(-heads // config.options["HEADS"]))](
                q, k, v, img, txt, *weights, rope, q if txt_offsets is None else txt_offsets,
                batch, tokens, length, text_programs, rows, heads, *strides, eps,
                TEXT=text, ALIGN=alignment(*strides[:4]), ACC=accumulator(img), SAMPLES=_samples(text, batch),
                HEAD_DIM=head_dim, **config.options,
            )  # fmt: skip
    return q, k, v


def backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, img_qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor,
    txt_kv: Tensor | None, txt_k_weight: Tensor | None, txt_offsets: Tensor | None, packed_keys: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by img_qkv and txt_kv (empty without text), and (3, D) by the weights of q, k and text k."""
    head_dim = q_weight.shape[0]
    batch, tokens, heads = *img_qkv.shape[:2], img_qkv.shape[2] // (3 * head_dim)
    places = 0 if packed_keys else grad_k.shape[1] - tokens
    text, length, rows = _text(batch, txt_kv, txt_offsets, places, packed_keys)
    device, of_weights = img_qkv.device, (q_weight, k_weight, q_weight if txt_k_weight is None else txt_k_weight)
    grad_img = torch.empty(img_qkv.shape, dtype=img_qkv.dtype, device=device)
    grad_txt = torch.empty((0,) if txt_kv is None else txt_kv.shape, dtype=img_qkv.dtype, device=device)
    grad_weights = torch.empty((3, head_dim), dtype=common_dtype(*of_weights), device=device)
    config = _tile(BACKWARD, heads, head_dim, img_qkv)
    blocks = -(-heads // config.options["HEADS"])
    chunk = max(1, -(-(batch * tokens + rows) * blocks // _MOST_PROGRAMS))
    programs = -(-batch * tokens // chunk), -(-rows // chunk)
    kind = torch.float64 if img_qkv.dtype == torch.float64 else torch.float32
    sums = torch.empty(((2 * programs[0] + programs[1]) * blocks, head_dim), dtype=kind, device=device)
    grads = [dense_rows(x) for x in (grad_q, grad_k, grad_v)]
    grad_strides = [n for x in grads for n in (x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2]))]
    img, txt, weights, rope, strides = _inputs(img_qkv, txt_kv, of_weights, rope)
    summing = tuned(SUM, head_dim, device).options
    with on_device(img):
        if sums.numel():
            kernels._backward_kernel[(sum(programs), blocks)](
                grad_img, grad_txt, sums, *grads, img, txt, *weights, rope,
                grad_q if txt_offsets is None else txt_offsets,
                batch, tokens, length, programs[0], chunk, batch * tokens, rows, heads, *grad_strides, *strides, eps,
                TEXT=text, ALIGN=alignment(*strides[:4], *grad_strides), ACC=accumulator(img),
                SAMPLES=_samples(text, batch), HEAD_DIM=head_dim, **config.options,
            )  # fmt: skip
        kernels._sum_kernel[(3, -(-head_dim // summing["COLS"]))](
            grad_weights, sums, programs[0] * blocks, programs[1] * blocks, ACC=accumulator(img), HEAD_DIM=head_dim,
            **summing,
        )  # fmt: skip
    return grad_img, grad_txt, grad_weights


def common_dtype(*weights: Tensor | None) -> torch.dtype:
    """Of the weights' gradients, which are one tensor."""
    dtypes = [weight.dtype for weight in weights if weight is not None]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return wide


def _text(
    batch: int, txt_kv: Tensor | None, txt_offsets: Tensor | None, txt_length: int, packed_keys: bool
) -> tuple[int, int, int]:
    """How text comes and goes, its places a sample, and its rows in all."""
    if txt_kv is None:
        return _NONE, 0, 0
    if txt_offsets is None:
        return _PADDED, txt_kv.shape[1], batch * txt_kv.shape[1]
    return (_PACKED_KEYS, 0, txt_kv.shape[0]) if packed_keys else (_PACKED, txt_length, txt_kv.shape[0])


def _inputs(
    img_qkv: Tensor, txt_kv: Tensor | None, weights: tuple[Tensor, Tensor, Tensor | None], rope: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, tuple[int, ...]]:
    """What the kernels read, rows dense, and the strides of image, text and tables; the image stands for no text."""
    img = dense_rows(img_qkv)
    txt = img if txt_kv is None else dense_rows(txt_kv)
    rope = (rope[:1] if rope.stride(0) == 0 else rope).contiguous()
    of_text = (txt.stride(0), txt.stride(1)) if txt.ndim == 3 else (0, txt.stride(0))
    strides = (img.stride(0), img.stride(1), *of_text, 0 if rope.shape[0] == 1 else rope.shape[1])
    dense = [(weights[0] if weight is None else weight).contiguous() for weight in weights]
    return img, txt, dense, rope, strides


def dense_rows(x: Tensor) -> Tensor:
    """x, copied where the numbers of a row are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tile(table: Table, heads: int, head_dim: int, x: Tensor) -> Config:
    """The table's row, with no more heads than there are."""
    config = tuned(table, head_dim, x.device)
    tile = dict(config.tile)
    most = 1 << (heads - 1).bit_length()
    return Config((("WIDTH", tile["WIDTH"]), ("HEADS", min(tile["HEADS"], most))), config.num_warps)


def _samples(text: int, batch: int) -> int:
    return 1 << max(batch - 1, 0).bit_length() if text in (_PACKED, _PACKED_KEYS) else 1


def accumulator(x: Tensor) -> Any:
    """Triton's type that sums are formed in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
