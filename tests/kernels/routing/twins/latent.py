"""SiT, REPA and LightningDiT, and SpeedrunDiT on REPA's code: `block(x, c, …)` over the tokens of a latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .parts import (
    HIDDEN,
    AdaLNBlock,
    Attention,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    VisionRotaryEmbeddingFast,
    angles,
    picture,
    rotate_half,
    times_and_labels,
)


class SiTBlock(AdaLNBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.adaptive(x, c)


class SiT(nn.Module):
    """willisma/SiT; facebookresearch/DiT has the same, its blocks called DiTBlock."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = PatchEmbed(), TimestepEmbedder(), LabelEmbedder()
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, HIDDEN), requires_grad=False)
        self.blocks = nn.ModuleList(self.block(i) for i in range(depth))
        self.final_layer = FinalLayer()

    def block(self, index: int) -> nn.Module:
        return SiTBlock()

    def embedded(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, self.training)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embedded(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class RepaSiT(SiT):
    """sihyun-yu/REPA: projectors read the tokens behind block `encoder_depth`, all of them, in their order."""

    def __init__(self) -> None:
        super().__init__(depth=6)
        self.encoder_depth = 2
        self.projectors = nn.ModuleList([nn.Linear(HIDDEN, 12)])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, c = self.embedded(x, t, y)
        number, tokens, width = x.shape
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i + 1 == self.encoder_depth:
                flat = x.reshape(-1, width)
                zs = [projector(flat).reshape(number, tokens, -1) for projector in self.projectors]
        return self.final_layer(x, c), zs


class LightningDiTBlock(AdaLNBlock):
    def __init__(self) -> None:
        super().__init__(attn=Attention(qk_norm=True))

    def forward(self, x: Tensor, c: Tensor, feat_rope=None) -> Tensor:
        return self.adaptive(x, c, rope=feat_rope)


class LightningDiT(SiT):
    """hustvl/LightningDiT: one rotary module for all blocks, and reentrant checkpoints hard-coded in the model."""

    def __init__(self, use_checkpoint: bool = True) -> None:
        super().__init__()
        self.feat_rope, self.use_checkpoint = VisionRotaryEmbeddingFast(), use_checkpoint

    def block(self, index: int) -> nn.Module:
        return LightningDiTBlock()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embedded(x, t, y)
        for block in self.blocks:
            if self.use_checkpoint:
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=True)
            else:
                x = block(x, c, self.feat_rope)
        return self.final_layer(x, c)


# --- SpeedrunDiT -------------------------------------------------------------------------------------------------


class IndexedRotary(nn.Module):
    """Tables of the whole grid, read at the ids of the tokens; tokens that are more than the grid stand ahead."""

    def __init__(self, features: int) -> None:
        super().__init__()
        both = angles(features).repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", both.cos())
        self.register_buffer("freqs_sin", both.sin())

    def forward(self, t: Tensor, rope_ids: Tensor) -> Tensor:
        ahead = max(0, t.shape[2] - self.freqs_cos.shape[0])
        cos, sin = (table[rope_ids[:, ahead:]].unsqueeze(1) for table in (self.freqs_cos, self.freqs_sin))
        tail = t[:, :, ahead:]
        return torch.cat((t[:, :, :ahead], tail * cos + rotate_half(tail) * sin), dim=2)


class ValueAttention(Attention):
    """Values of the first block are mixed into those of the others; each block notes its own."""

    def __init__(self) -> None:
        super().__init__(qk_norm=True)
        self.v1_lambda = nn.Parameter(torch.tensor(0.5))
        self.v_last: Tensor | None = None

    def forward(self, x: Tensor, rope=None, rope_ids=None, v1=None) -> Tensor:
        q, k, v = self.heads(x)
        self.v_last = v
        if v1 is not None:
            v = self.v1_lambda * v1 + (1 - self.v1_lambda) * v
        return self.mixed(rope(q, rope_ids), rope(k, rope_ids), v)


class SpeedrunBlock(AdaLNBlock):
    def __init__(self) -> None:
        super().__init__(attn=ValueAttention())

    def forward(self, x: Tensor, c: Tensor, feat_rope=None, rope_ids=None, v1=None) -> Tensor:
        return self.adaptive(x, c, rope=feat_rope, rope_ids=rope_ids, v1=v1)


class SpeedrunSiT(SiT):
    """SwayStar123/SpeedrunDiT with its own dropping of tokens off (`sprint_drop_ratio = 0`): a class token ahead."""

    def __init__(self) -> None:
        super().__init__(depth=8)
        self.num_f, self.num_h = 2, 2
        self.feat_rope = IndexedRotary(HIDDEN // 2)
        self.cls_projectors2, self.fusion_proj = nn.Linear(12, HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def block(self, index: int) -> nn.Module:
        return SpeedrunBlock()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor) -> tuple[Tensor, Tensor]:
        x, c = self.embedded(x, t, y)
        ids = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        ids = torch.cat((torch.zeros_like(ids[:, :1]), ids), dim=1)
        x, v1 = torch.cat((self.cls_projectors2(cls_token).unsqueeze(1), x), dim=1), None
        for block in self.blocks[: self.num_f]:
            x = block(x, c, self.feat_rope, ids, v1=v1)
            v1 = block.attn.v_last if v1 is None else v1
        middle = x
        for block in self.blocks[self.num_f : -self.num_h]:
            middle = block(middle, c, self.feat_rope, ids, v1=v1)
        x = self.fusion_proj(torch.cat((x, middle), dim=-1))
        for block in self.blocks[-self.num_h :]:
            x = block(x, c, self.feat_rope, ids, v1=v1)
        out = self.final_layer(x, c)
        return out[:, 1:], out[:, 0]


# --- small ones --------------------------------------------------------------------------------------------------


def sit():
    model, inputs = SiT(), (picture(), *times_and_labels())
    return model, lambda: model(*inputs)


def repa():
    model, inputs = RepaSiT(), (picture(), *times_and_labels())

    def run() -> Tensor:
        out, zs = model(*inputs)
        return torch.cat([out.flatten(1), *(z.flatten(1) for z in zs)], dim=1)

    return model, run


def lightning():
    model, inputs = LightningDiT(), (picture().requires_grad_(), *times_and_labels())
    return model, lambda: model(*inputs)


def speedrun():
    model, inputs = SpeedrunSiT(), (picture(), *times_and_labels(), torch.randn(2, 12))

    def run() -> Tensor:
        out, cls = model(*inputs)
        return torch.cat((out.flatten(1), cls), dim=1)

    return model, run


MAKERS = {"SiT": sit, "REPA": repa, "LightningDiT": lightning, "SpeedrunDiT": speedrun}
