"""The layers of a PRX transformer; parameter names are those of diffusers' `PRXTransformer2DModel`.

Block: adaLN-zero modulation, attention of image tokens over [text, image] with q/k RMS norm and 2-D rotary
positions, gated tanh-GELU MLP (docs/recipe.md, "Model").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prx_kernels import norm_modulate, qk_norm_rope, residual_gate_norm_modulate

from .attention import Backend, attend, attend_packed
from .config import PRXConfig

TIME_FEATURES = 256  # diffusers' PRXTransformer2DModel, time_in
TIME_FACTOR = 1000.0
TIME_MAX_PERIOD = 10_000
NORM_EPS = 1e-6


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoidal embedding of t in [0, 1]: (batch,) -> (batch, 256) float32, cosines first, frequencies of 1000·t."""
    half = TIME_FEATURES // 2
    exponent = -math.log(TIME_MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = TIME_FACTOR * (t.float()[:, None] * exponent.exp()[None, :])
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_table(rows: int, columns: int, axes_dim: tuple[int, int], theta: int, device: torch.device) -> Tensor:
    """Cosines and sines of 2-D rotary positions: (1, rows·columns, head_dim/2, 2) float32, row features first.

    Angles are formed in float64, as in the reference model, and rounded once.
    """
    row = torch.arange(rows, dtype=torch.float64, device=device)[:, None].expand(rows, columns).reshape(-1)
    column = torch.arange(columns, dtype=torch.float64, device=device).repeat(rows)
    angles = []
    for position, dim in ((row, axes_dim[0]), (column, axes_dim[1])):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angles.append(position[:, None] * frequency[None, :])
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()[None]


class TimeEmbedder(nn.Module):
    """Two linear maps with SiLU between: (batch, 256) -> (batch, hidden)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(TIME_FEATURES, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t).to(self.in_layer.weight.dtype)
        out: Tensor = self.out_layer(F.silu(self.in_layer(features)))
        return out


class Attention(nn.Module):
    """Image queries over text and image keys; RMS norm on queries and keys, rotary positions on the image only."""

    def __init__(self, config: PRXConfig, backend: Backend) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.heads, self.backend = config.num_heads, backend
        self.img_qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(
        self, x: Tensor, text: Tensor, rotary: Tensor, text_mask: Tensor | None, text_offsets: Tensor | None = None
    ) -> Tensor:
        length = None if text_offsets is None or text_mask is None else text_mask.shape[1]
        packed_keys = length is not None and self.backend != "sdpa"
        q, k, v = qk_norm_rope(
            self.img_qkv_proj(x),
            self.norm_q.weight,
            self.norm_k.weight,
            rotary,
            self.txt_kv_proj(text),
            self.norm_added_k.weight,
            txt_offsets=text_offsets,
            txt_length=None if packed_keys else length,
            packed_keys=packed_keys,
            eps=NORM_EPS,
        )
        if packed_keys and length is not None and text_offsets is not None:
            (batch, tokens), device = x.shape[:2], x.device
            cu_keys = text_offsets + torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=device)
            out = attend_packed(q, k, v, cu_keys, length + tokens, self.backend)
        else:
            out = attend(q, k, v, text_mask, self.backend).transpose(1, 2)
        result: Tensor = self.to_out[0](out.reshape(x.shape))
        return result


class Modulation(nn.Module):
    """adaLN-zero: shift, scale and gate for attention and for the MLP, beside one another: (batch, 6·hidden)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, temb: Tensor) -> Tensor:
        out: Tensor = self.lin(F.silu(temb))
        return out


class PRXBlock(nn.Module):
    """One transformer block: x (batch, N, hidden) in and out; text is read, never written.

    text is (batch, L, hidden), or (rows, hidden) with `text_offsets` (`packed_text.PackedText`).
    """

    def __init__(self, config: PRXConfig, backend: Backend = "sdpa") -> None:
        super().__init__()
        self.attention = Attention(config, backend)
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.modulation = Modulation(config.hidden_size)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        temb: Tensor,
        rotary: Tensor,
        text_mask: Tensor | None = None,
        text_offsets: Tensor | None = None,
    ) -> Tensor:
        width = x.shape[2]
        before, between, gate = self.modulation(temb).split((2 * width, 3 * width, width), dim=1)
        x, h = norm_modulate(x, before, eps=NORM_EPS)
        branch = self.attention(h, text, rotary, text_mask, text_offsets)
        x, h, again = residual_gate_norm_modulate(x, branch, between, eps=NORM_EPS)
        return x + gate[:, None] * self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(again))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map to the values of a patch: (batch, N, hidden) -> (batch, N, C·p²)."""

    def __init__(self, config: PRXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        _, h = norm_modulate(x, self.adaLN_modulation(temb), eps=NORM_EPS)
        out: Tensor = self.linear(h)
        return out
