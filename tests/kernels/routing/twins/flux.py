"""Flux as Black Forest Labs publish it: double blocks, text put ahead of the image, single blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import HEADS, HIDDEN, SIDE, FinalLayer, Mlp, TimestepEmbedder

TEXT, AXES = 5, (4, 6, 6)


def rotation(ids: Tensor, heads_dim: int) -> Tensor:
    """(batch, 1, tokens, features // 2, 2, 2), the 1 at `heads_dim`: a matrix for each pair of features."""
    speeds = [100.0 ** -torch.linspace(0, 1, dim // 2) for dim in AXES]
    angle = torch.cat([ids[..., i, None] * speed for i, speed in enumerate(speeds)], dim=-1)
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), dim=-1)
    return matrix.unflatten(-1, (2, 2)).unsqueeze(heads_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    pe = pe if pe.shape[1] == 1 else pe.transpose(1, 2)
    q, k = ((pe @ x.unflatten(-1, (-1, 2, 1))).flatten(-3) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Stream(nn.Module):
    """A double block's half: the image's, or the text's."""

    def __init__(self) -> None:
        super().__init__()
        self.mod, self.qkv, self.proj = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN), Mlp()
        self.norm, self.mlp = nn.LayerNorm(HIDDEN, elementwise_affine=False), Mlp()

    def into(self, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = self.mod(F.silu(vec))[:, None].chunk(4, dim=-1)[:2]
        return heads(self.qkv(self.norm(x) * (1 + scale) + shift))

    def behind(self, x: Tensor, mixed: Tensor, vec: Tensor) -> Tensor:
        gates = self.mod(F.silu(vec))[:, None].chunk(4, dim=-1)[2:]
        x = x + gates[0] * self.proj(mixed)
        return x + gates[1] * self.mlp(self.norm(x))


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = Stream(), Stream()

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.txt.into(txt, vec), self.img.into(img, vec), strict=True)
        mixed = attention(*(torch.cat(pair, dim=2) for pair in pairs), pe)
        text = txt.shape[1]
        return self.img.behind(img, mixed[:, text:], vec), self.txt.behind(txt, mixed[:, :text], vec)


class SingleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(HIDDEN, 5 * HIDDEN), nn.Linear(3 * HIDDEN, HIDDEN)
        self.modulation, self.pre_norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN, elementwise_affine=False)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        qkv, mlp = self.linear1(self.pre_norm(x)).split((3 * HIDDEN, 2 * HIDDEN), dim=-1)
        output = self.linear2(torch.cat((attention(*heads(qkv), pe), F.gelu(mlp)), dim=2))
        return x + self.modulation(F.silu(vec))[:, None] * output


class Flux(nn.Module):
    """black-forest-labs/flux: `block(img=…, txt=…, vec=…, pe=…)`, then `block(img, vec=…, pe=…)`.

    torchtitan's has the heads of its rotary table behind the tokens.
    """

    def __init__(self, heads_dim: int = 1, depth: int = 3, depth_single_blocks: int = 3) -> None:
        super().__init__()
        self.heads_dim = heads_dim
        self.img_in, self.txt_in, self.time_in = nn.Linear(16, HIDDEN), nn.Linear(12, HIDDEN), TimestepEmbedder()
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock() for _ in range(depth_single_blocks))
        self.final_layer = FinalLayer()

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor) -> Tensor:
        img, txt, vec = self.img_in(img), self.txt_in(txt), self.time_in(timesteps)
        pe = rotation(torch.cat((txt_ids, img_ids), dim=1), self.heads_dim)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.final_layer(img[:, txt.shape[1] :], vec)


def flux(heads_dim: int = 1):
    model = Flux(heads_dim)
    row, column = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    ids = torch.stack((0 * row, row, column), dim=-1).flatten(0, 1).expand(2, -1, -1)
    image, text = torch.randn(2, SIDE**2, 16), torch.randn(2, TEXT, 12)
    inputs = (image, ids, text, torch.zeros(2, TEXT, 3), torch.tensor([0.1, 0.7]))
    return model, lambda: model(*inputs)


MAKERS = {"Flux by BFL": flux, "Flux by torchtitan": lambda: flux(2)}
