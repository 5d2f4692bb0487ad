"""DDT, RAE's DiT with DDT's head, and PixNerd: an encoder's tokens condition a decoder, both in one list of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import (
    HIDDEN,
    SIDE,
    AdaLNBlock,
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    VisionRotaryEmbeddingFast,
    complex_table,
    picture,
    rotated_by,
    times_and_labels,
)


class RAttention(Attention):
    def __init__(self) -> None:
        super().__init__(qk_norm=True)

    def forward(self, x: Tensor, pos: Tensor, mask=None) -> Tensor:
        q, k, v = self.heads(x)
        q, k = rotated_by(q, pos), rotated_by(k, pos)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class DDTBlock(AdaLNBlock):
    """Conditioned by one vector (encoder) or by one for each token (decoder)."""

    def __init__(self) -> None:
        super().__init__(attn=RAttention())

    def forward(self, x: Tensor, c: Tensor, pos: Tensor, mask=None) -> Tensor:
        return self.adaptive(x, c, pos, mask=mask)


class DDT(nn.Module):
    """MCG-NJU/DDT: complex rotary tables, cached by size."""

    def __init__(self, num_encoder_blocks: int = 5, num_blocks: int = 8) -> None:
        super().__init__()
        self.num_encoder_blocks = num_encoder_blocks
        self.x_embedder, self.s_embedder = nn.Linear(16, HIDDEN), nn.Linear(16, HIDDEN)
        self.t_embedder, self.y_embedder = TimestepEmbedder(), LabelEmbedder(dropout_prob=0.0)
        self.blocks = nn.ModuleList(DDTBlock() for _ in range(num_blocks))
        self.final_layer = FinalLayer()
        self.precompute_pos: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s=None, mask=None) -> tuple[Tensor, Tensor]:
        pos = self.precompute_pos.setdefault(x.shape[2], complex_table())
        x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
        t = self.t_embedder(t).unsqueeze(1)
        c = F.silu(t + self.y_embedder(y, self.training).unsqueeze(1))
        s = self.s_embedder(x)
        for i in range(self.num_encoder_blocks):
            s = self.blocks[i](s, c, pos, mask)
        s, x = F.silu(t + s), self.x_embedder(x)
        for i in range(self.num_encoder_blocks, len(self.blocks)):
            x = self.blocks[i](x, s, pos, None)
        return self.final_layer(x, s), s


# --- RAE ---------------------------------------------------------------------------------------------------------


class LightningDDTBlock(AdaLNBlock):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, attn=Attention(dim))

    def forward(self, x: Tensor, c: Tensor, feat_rope=None) -> Tensor:
        return self.adaptive(x, c, rope=feat_rope)


class DiTwDDTHead(nn.Module):
    """bytetriper/RAE: the head's blocks are wider, and rotary modules are the encoder's and the decoder's."""

    def __init__(self, hidden_size: tuple[int, int] = (HIDDEN, 48), depth: tuple[int, int] = (5, 2)) -> None:
        super().__init__()
        encoder, decoder = hidden_size
        self.num_encoder_blocks, self.num_blocks = depth[0], sum(depth)
        self.x_embedder, self.s_embedder = PatchEmbed(4, decoder), PatchEmbed(4, encoder)
        self.s_projector = nn.Linear(encoder, decoder)
        self.t_embedder, self.y_embedder = TimestepEmbedder(encoder), LabelEmbedder(encoder, dropout_prob=0.0)
        self.pos_embed = nn.Parameter(torch.zeros(1, SIDE**2, encoder), requires_grad=False)
        self.enc_feat_rope = VisionRotaryEmbeddingFast(encoder // 2)
        self.dec_feat_rope = VisionRotaryEmbeddingFast(decoder // 2)
        widths = [encoder] * depth[0] + [decoder] * depth[1]
        self.blocks = nn.ModuleList(LightningDDTBlock(width) for width in widths)
        self.final_layer = FinalLayer(decoder)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s=None, mask=None) -> Tensor:
        t = self.t_embedder(t)
        c = F.silu(t + self.y_embedder(y, self.training))
        s = self.s_embedder(x) + self.pos_embed
        for i in range(self.num_encoder_blocks):
            s = self.blocks[i](s, c, feat_rope=self.enc_feat_rope)
        s = self.s_projector(F.silu(t.unsqueeze(1).repeat(1, s.shape[1], 1) + s))
        x = self.x_embedder(x)
        for i in range(self.num_encoder_blocks, self.num_blocks):
            x = self.blocks[i](x, s, feat_rope=self.dec_feat_rope)
        return self.final_layer(x, s)


# --- PixNerd -----------------------------------------------------------------------------------------------------


class FlattenDiTBlock(DDTBlock):
    pass


class NerfBlock(nn.Module):
    """A token's vector makes the weights that read the pixels of its patch: (batch · tokens, pixels, features)."""

    def __init__(self, hidden_size_s: int = HIDDEN, hidden_size_x: int = 4) -> None:
        super().__init__()
        self.param_generator1 = nn.Linear(hidden_size_s, hidden_size_x**2)
        self.mlp = Mlp(hidden_size_x)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        weight = self.param_generator1(s).unflatten(-1, (x.shape[-1], x.shape[-1]))
        return x + self.mlp(torch.bmm(x, F.normalize(weight, dim=-2)))


class PixNerDiT(nn.Module):
    """MCG-NJU/PixNerd, of classes: blocks of two kinds in one list, the second kind without tokens to route."""

    def __init__(self, num_cond_blocks: int = 5, num_blocks: int = 7) -> None:
        super().__init__()
        self.num_cond_blocks = num_cond_blocks
        self.x_embedder, self.s_embedder = nn.Linear(3, 4), nn.Linear(12, HIDDEN)
        self.t_embedder, self.y_embedder = TimestepEmbedder(), LabelEmbedder(dropout_prob=0.0)
        self.blocks = nn.ModuleList(FlattenDiTBlock() for _ in range(num_cond_blocks))
        self.blocks.extend(NerfBlock() for _ in range(num_cond_blocks, num_blocks))
        self.final_layer = nn.Linear(4, 3)
        self.precompute_pos: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s=None, mask=None) -> Tensor:
        pos = self.precompute_pos.setdefault(x.shape[2], complex_table())
        x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
        t = self.t_embedder(t).unsqueeze(1)
        c, s = F.silu(t + self.y_embedder(y, self.training).unsqueeze(1)), self.s_embedder(x)
        for i in range(self.num_cond_blocks):
            s = self.blocks[i](s, c, pos, mask)
        s = F.silu(t + s)
        x = self.x_embedder(x.reshape(-1, 3, 4).transpose(1, 2))
        for i in range(self.num_cond_blocks, len(self.blocks)):
            x = self.blocks[i](x, s.flatten(0, 1))
        return self.final_layer(x).unflatten(0, s.shape[:2])


# --- small ones --------------------------------------------------------------------------------------------------


def ddt():
    model, inputs = DDT(), (picture(), *times_and_labels())
    return model, lambda: torch.cat(model(*inputs), dim=-1)


def rae():
    model, inputs = DiTwDDTHead(), (picture(), *times_and_labels())
    return model, lambda: model(*inputs)


def pixnerd():
    model, inputs = PixNerDiT(), (picture(3), *times_and_labels())
    return model, lambda: model(*inputs)


MAKERS = {"DDT": ddt, "DDT, decoder": ddt, "RAE": rae, "PixNerd": pixnerd}
