"""Small transformers of the shapes that other people's code has, for tests of `route_blocks`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS = 16, 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rotary_tables(tokens: int, dim: int = HIDDEN // HEADS) -> tuple[Tensor, Tensor]:
    angle = torch.arange(tokens)[:, None] * (10000.0 ** -torch.linspace(0, 1, dim // 2))
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, rope=None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if callable(rope):
            q, k = rope(q), rope(k)
        elif rope is not None:
            q, k = (rotate(t, *rope) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """DiT and SiT: `block(x, c)`; with a rotary embedding, LightningDiT and JiT: `block(x, c, feat_rope)`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(HIDDEN, elementwise_affine=False, eps=1e-6)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(approximate="tanh"), nn.Linear(32, HIDDEN))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 6 * HIDDEN))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c: Tensor, feat_rope=None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, feat_rope)
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


class TupleBlock(Block):
    """Two streams: takes and returns them, the tokens second."""

    def forward(self, *, text: Tensor, hidden: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return text + 1, super().forward(hidden, c)


class Rope(nn.Module):
    """A rotary embedding as EVA's and JiT's code has it: a module that is called, its tables (tokens, dim) buffers."""

    def __init__(self, tokens: int, ahead: int = 0) -> None:
        super().__init__()
        cos, sin = rotary_tables(tokens)
        ones = torch.ones(ahead, cos.shape[1])
        self.register_buffer("freqs_cos", torch.cat((ones, cos)))
        self.register_buffer("freqs_sin", torch.cat((0 * ones, sin)))

    def forward(self, t: Tensor) -> Tensor:
        return rotate(t, self.freqs_cos, self.freqs_sin)


class Model(nn.Module):
    """A loop over blocks; `rope` and `prefix` (in-context tokens ahead of the image) as in JiT."""

    def __init__(self, depth: int = 4, *, rope=None, prefix: int = 0, dropout: float = 0.0, checkpoint=None) -> None:
        super().__init__()
        self.embed = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(depth))
        self.context = nn.Parameter(torch.randn(prefix, HIDDEN)) if prefix else None
        self.rope = rope
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.embed(x)
        if self.context is not None:
            x = torch.cat((self.context.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            extra = () if self.rope is None else (self.rope,)
            x = block(x, c, *extra) if self.checkpoint is None else self.checkpoint(block, x, c, *extra)
        return x


def inputs(batch: int = 2, tokens: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, HIDDEN, generator=generator), torch.randn(batch, HIDDEN, generator=generator)


def permutations(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """(batch, tokens) int32: all tokens, in another random order for every sample."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)]).int()
