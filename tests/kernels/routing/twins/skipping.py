"""U-ViT: what blocks of the first half give is put beside the tokens of the second half's, last in, first out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .parts import CLASSES, HIDDEN, SIDE, Attention, Mlp, PatchEmbed, TimestepEmbedder, picture, times_and_labels


class Block(nn.Module):
    """Checkpointed from inside, reentrant as older torch has it unless told."""

    def __init__(self, skip: bool = False, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.mlp, self.use_checkpoint = Attention(), Mlp(), use_checkpoint
        self.skip_linear = nn.Linear(2 * HIDDEN, HIDDEN) if skip else None

    def forward(self, x: Tensor, skip=None) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, skip, use_reentrant=True)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip=None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """baofff/U-ViT: time and label are tokens, ahead of the image's."""

    def __init__(self, depth: int = 6, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.extras = 2
        self.patch_embed, self.time_embed = PatchEmbed(), TimestepEmbedder()
        self.label_emb = nn.Embedding(CLASSES, HIDDEN)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + SIDE**2, HIDDEN))
        self.in_blocks = nn.ModuleList(Block(use_checkpoint=use_checkpoint) for _ in range(depth // 2))
        self.mid_block = Block(use_checkpoint=use_checkpoint)
        self.out_blocks = nn.ModuleList(Block(True, use_checkpoint) for _ in range(depth // 2))
        self.decoder_pred = nn.Linear(HIDDEN, 16)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        extra = torch.stack((self.label_emb(y), self.time_embed(timesteps)), dim=1)
        x, skips = torch.cat((extra, self.patch_embed(x)), dim=1) + self.pos_embed, []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.decoder_pred(x)[:, self.extras :]


def uvit():
    model, inputs = UViT(), (picture(), *times_and_labels())
    return model, lambda: model(*inputs)


MAKERS = {"U-ViT": uvit}
