"""JiT: class tokens join the image's ahead of it at a block in the middle, and rotary tables are plain attributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import (
    HEADS,
    HIDDEN,
    AdaLNBlock,
    Attention,
    FinalLayer,
    LabelEmbedder,
    TimestepEmbedder,
    angles,
    picture,
    rotate_half,
    times_and_labels,
)


class VisionRotaryEmbeddingFast(nn.Module):
    """Neither buffers nor parameters: `model.to(device)` does not move them either."""

    def __init__(self, num_cls_token: int = 0) -> None:
        super().__init__()
        both = angles(HIDDEN // HEADS).repeat_interleave(2, dim=-1)
        ones = torch.ones(num_cls_token, both.shape[1])
        self.freqs_cos = torch.cat((ones, both.cos()))
        self.freqs_sin = torch.cat((0 * ones, both.sin()))

    def forward(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos + rotate_half(t) * self.freqs_sin


class BottleneckPatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj1, self.proj2 = nn.Conv2d(3, 8, 2, stride=2, bias=False), nn.Conv2d(8, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class JiTBlock(AdaLNBlock):
    def __init__(self) -> None:
        super().__init__(attn=Attention(qk_norm=True))

    def forward(self, x: Tensor, c: Tensor, feat_rope=None) -> Tensor:
        return self.adaptive(x, c, rope=feat_rope)


class JiT(nn.Module):
    """LTH14/JiT."""

    def __init__(self, depth: int = 6, in_context_len: int = 3, in_context_start: int = 2) -> None:
        super().__init__()
        self.in_context_len, self.in_context_start = in_context_len, in_context_start
        self.x_embedder, self.t_embedder = BottleneckPatchEmbed(), TimestepEmbedder()
        self.y_embedder = LabelEmbedder(dropout_prob=0.0)
        self.in_context_posemb = nn.Parameter(torch.zeros(1, in_context_len, HIDDEN))
        self.feat_rope, self.feat_rope_incontext = (VisionRotaryEmbeddingFast(n) for n in (0, in_context_len))
        self.blocks = nn.ModuleList(JiTBlock() for _ in range(depth))
        self.final_layer = FinalLayer(out=12)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        label = self.y_embedder(y, self.training)
        c, x = self.t_embedder(t) + label, self.x_embedder(x)
        for i, block in enumerate(self.blocks):
            if i == self.in_context_start:
                x = torch.cat((label.unsqueeze(1) + self.in_context_posemb, x), dim=1)
            x = block(x, c, self.feat_rope if i < self.in_context_start else self.feat_rope_incontext)
        return self.final_layer(x[:, self.in_context_len :], c)


def jit():
    model, inputs = JiT(), (picture(3), *times_and_labels())
    return model, lambda: model(*inputs)


MAKERS = {"JiT": jit}
