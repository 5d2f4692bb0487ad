"""What several twins are made of. Pictures are 8 × 8 in patches of 2: 16 tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS, CLASSES, SIDE = 32, 2, 10, 4  # SIDE: tokens in a row


def picture(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 2 * SIDE, 2 * SIDE)


def times_and_labels() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.1, 0.7]), torch.tensor([1, 2])


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int = 4, embed_dim: int = HIDDEN) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, 2, stride=2)
        self.num_patches = SIDE**2

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int = HIDDEN) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.view(-1, 1) * torch.arange(1, 5)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class LabelEmbedder(nn.Module):
    """One more class than there are, for labels that are dropped while training."""

    def __init__(self, hidden_size: int = HIDDEN, dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.embedding_table, self.dropout_prob = nn.Embedding(CLASSES + 1, hidden_size), dropout_prob

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train:
            labels = torch.where(torch.rand(labels.shape[0]) < self.dropout_prob, CLASSES, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Queries and keys are normed (qk_norm); `rope` rotates (batch, heads, tokens, features) and is called."""

    def __init__(self, dim: int = HIDDEN, num_heads: int = HEADS, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        norms = (nn.RMSNorm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rope=None) -> Tensor:
        q, k, v = self.heads(x)
        if rope is not None:
            q, k = rope(q), rope(k)
        return self.mixed(q, k, v)


class Mlp(nn.Sequential):
    def __init__(self, dim: int = HIDDEN) -> None:
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))


class AdaLNBlock(nn.Module):
    """What a DiT's block does to its tokens: six vectors of c, (batch, hidden) or (batch, 1 or tokens, hidden)."""

    def __init__(self, dim: int = HIDDEN, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = Attention(dim) if attn is None else attn
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def adaptive(self, x: Tensor, c: Tensor, *positions, **keywords) -> Tensor:
        six = self.adaLN_modulation(c if c.ndim == 3 else c.unsqueeze(1)).chunk(6, dim=-1)
        shift, scale, gate = six[:3]
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, *positions, **keywords)
        shift, scale, gate = six[3:]
        return x + gate * self.mlp(self.norm2(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, dim: int = HIDDEN, out: int = 16) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(dim, elementwise_affine=False), nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c if c.ndim == 3 else c.unsqueeze(1)).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


# --- rotary positions --------------------------------------------------------------------------------------------


def angles(features: int) -> Tensor:
    """(tokens, features // 2): of a token's row and its column."""
    speed = 100.0 ** -torch.linspace(0, 1, features // 4)
    row, column = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    return torch.cat((row.reshape(-1, 1) * speed, column.reshape(-1, 1) * speed), dim=-1)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), dim=-1).flatten(-2)


class VisionRotaryEmbeddingFast(nn.Module):
    """As in EVA's line of code: called with queries and with keys; its tables (tokens, features) are buffers."""

    def __init__(self, features: int = HIDDEN // HEADS) -> None:
        super().__init__()
        both = angles(features).repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", both.cos())
        self.register_buffer("freqs_sin", both.sin())

    def forward(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos + rotate_half(t) * self.freqs_sin


def complex_table(features: int = HIDDEN // HEADS) -> Tensor:
    """(tokens, features // 2) complex, as in DDT's and PixNerd's code."""
    angle = angles(features)
    return torch.polar(torch.ones_like(angle), angle)


def rotated_by(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """x: (batch, heads, tokens, features)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)
