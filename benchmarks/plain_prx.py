"""What the PRX repository's step does, written here in plain PyTorch: the baseline, and in float64 the truth.

Patches are unfolded, the text mask is a number for every head, query and key, tokens are routed by forward hooks with
`masked_select`, noise and x_t are stored, the loss is formed between velocities. Parameters have `PRXTransformer`'s
names. The kernel of attention is the fastest that takes such a mask (cuDNN's where it runs), as in the repository.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prx_model.config import PRXConfig, Routing
from prx_model.layers import NORM_EPS, FinalLayer, Modulation, TimeEmbedder, rotary_table


class PlainPRX(nn.Module):
    """The transformer: noisy picture, time and padded text in, clean picture out; sizes by `PRXConfig`."""

    def __init__(self, config: PRXConfig) -> None:
        super().__init__()
        assert config.bottleneck_size is not None
        self.config, width = config, config.hidden_size
        self.img_in = nn.Sequential(
            nn.Linear(config.patch_features, config.bottleneck_size), nn.Linear(config.bottleneck_size, width)
        )
        self.time_in = TimeEmbedder(width)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, image: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(batch, channels, H, W), (batch,), (batch, L, width) and (batch, L) bool -> (batch, channels, H, W)."""
        p, (batch, _, height, width) = self.config.patch_size, image.shape
        x = self.img_in(F.unfold(image, p, stride=p).transpose(1, 2).to(self.txt_in.weight.dtype))
        context, temb = self.txt_in(text.to(self.txt_in.weight.dtype)), self.time_in(t)
        cos, sin = rotary_table(height // p, width // p, self.config.axes_dim, self.config.theta, image.device).unbind(
            -1
        )
        turns = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
        rotary = turns[:, None].expand(batch, -1, -1, -1, -1, -1)
        for block in self.blocks:
            x = block(x, text=context, temb=temb, rotary=rotary, text_mask=text_mask)
        return F.fold(self.final_layer(x, temb).transpose(1, 2), (height, width), p, stride=p)


class PlainAttention(nn.Module):
    """Image queries over [text, image] keys with an additive mask of shape (batch, heads, queries, keys)."""

    expanded = True
    """Whether the mask is made at its full size; False is the same numbers, for a truth that must fit in memory."""

    def __init__(self, config: PRXConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.img_qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm_q, self.norm_k, self.norm_added_k = (
            nn.RMSNorm(config.head_dim, eps=NORM_EPS) for _ in ("q", "k", "text k")
        )
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, text: Tensor, rotary: Tensor, text_mask: Tensor) -> Tensor:
        q, k, v = self.img_qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        text_k, text_v = self.txt_kv_proj(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (turn(norm(part, n.weight).to(v.dtype), rotary) for part, n in ((q, self.norm_q), (k, self.norm_k)))
        key = torch.cat((norm(text_k, self.norm_added_k.weight).to(v.dtype), k), dim=2)
        value = torch.cat((text_v, v), dim=2)
        real = torch.cat((text_mask, text_mask.new_ones(x.shape[:2])), dim=1)
        wide = real[:, None, None, :]
        if self.expanded:
            wide = wide.expand(-1, self.heads, x.shape[1], -1)
        bias = (1.0 - wide.to(q.dtype)) * torch.finfo(q.dtype).min
        with masked_kernel(q):
            out = F.scaled_dot_product_attention(q.contiguous(), key.contiguous(), value.contiguous(), attn_mask=bias)
        result: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return result


class PlainBlock(nn.Module):
    """adaLN-zero block: modulated attention, modulated gated MLP."""

    def __init__(self, config: PRXConfig) -> None:
        super().__init__()
        self.attention = PlainAttention(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.modulation = Modulation(config.hidden_size)

    def forward(self, x: Tensor, *, text: Tensor, temb: Tensor, rotary: Tensor, text_mask: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(temb)[:, None].chunk(6, dim=-1)
        h = (1 + scale_a) * F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) + shift_a
        x = x + gate_a * self.attention(h, text, rotary, text_mask)
        h = (1 + scale_m) * F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) + shift_m
        return x + gate_m * self.down_proj(F.gelu(self.gate_proj(h), approximate="tanh") * self.up_proj(h))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm of the last dimension, formed in float32 (float64 for such x)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS) * weight


def turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Neighbouring pairs of x (batch, heads, N, head_dim) times matrices (batch, 1, N, head_dim/2, 2, 2)."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 1, 2))
    turned = rotary[..., 0] * pairs[..., 0] + rotary[..., 1] * pairs[..., 1]
    return turned.flatten(-2).to(x.dtype)


def masked_kernel(query: Tensor) -> AbstractContextManager[Any]:
    """cuDNN's attention first, then torch's memory-efficient one; torch's choice for float32 and on a CPU."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


class HookRouting:
    """TREAD by forward hooks on a model's blocks, which must take tokens (batch, N, hidden).

    Args:
        blocks: the model's.
        routing: which of them see the kept tokens only, and how many bypass.
        tokens, rotary: names of the blocks' arguments; tokens may be given by place too. The rotary tables have one
            entry a token in dimension 2, and a batch.
    """

    def __init__(self, blocks: nn.ModuleList, routing: Routing, *, tokens: str = "x", rotary: str = "rotary") -> None:
        self.routing, self.tokens, self.rotary = routing, tokens, rotary
        self.scores: Tensor | None = None
        """(batch, N) in place of random numbers; the smallest bypass. A check fixes the routed tokens by these."""
        self.keep: Tensor | None = None
        """(batch, K) int64, sorted: the tokens that went through the blocks in the last forward."""
        for i in range(routing.start, routing.end + 1):
            hook = self._enter if i == routing.start else self._stay
            blocks[i].register_forward_pre_hook(hook, with_kwargs=True)
        blocks[routing.end].register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs[self.tokens]
        batch, count, _ = x.shape
        scores = torch.rand(batch, count, device=x.device) if self.scores is None else self.scores
        bypassing = min(max(round(count * self.routing.selection_ratio), 1), count - 1)
        self.bypass = scores.topk(bypassing, dim=1, largest=False).indices
        kept = torch.ones(batch, count, dtype=torch.bool, device=x.device).scatter(1, self.bypass, False)
        every = torch.arange(count, device=x.device).expand(batch, -1)
        self.keep = every.masked_select(kept).view(batch, count - bypassing)
        self.stash, self.shape = x.gather(1, _wide(self.bypass, x)), x.shape
        table = kwargs[self.rotary]
        index = self.keep[:, None, :].reshape(batch, 1, -1, *[1] * (table.ndim - 3))
        self.table = table.gather(2, index.expand(-1, -1, -1, *table.shape[3:]))
        return self._with(args, {**kwargs, self.rotary: self.table}, x.gather(1, _wide(self.keep, x)))

    def _stay(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, self.rotary: self.table}

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.keep is not None
        out = output.new_zeros(self.shape).scatter(1, _wide(self.keep, output), output)
        return out.scatter(1, _wide(self.bypass, output), self.stash.to(output.dtype))

    def _with(self, args: Any, kwargs: Any, x: Tensor) -> Any:
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, self.tokens: x})


def velocity_loss(x0_hat: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, *, t_min: float = 0.05) -> Tensor:
    """Mean squared difference of predicted and true velocity, `(x_t - x0) / max(t, t_min)` each (docs/recipe.md)."""
    level = t.clamp(min=t_min)[:, None, None, None]
    return ((x_t - x0_hat) / level - (x_t - x0) / level).square().mean()


def sample_t(batch: int, device: torch.device) -> Tensor:
    """Times by torch's own generator: shifted sigmoid of a normal, a tenth uniform (docs/recipe.md, "Objective")."""
    shifted = torch.randn(batch, device=device).sigmoid()
    shifted = 3 * shifted / (1 + 2 * shifted)
    uniform = torch.rand(batch, device=device)
    return torch.where(torch.rand(batch, device=device) < 0.1, uniform, shifted).clamp(min=1e-3)


class PlainEMA:
    """Averages moved one tensor after the other, as the repository does."""

    def __init__(self, parameters: list[nn.Parameter], decay: float, every: int) -> None:
        self.parameters, self.decay, self.every = parameters, decay, every
        self.averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % self.every == 0:
            for average, weight in self.pairs():
                average.copy_(average * self.decay + weight * (1.0 - self.decay))

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.averages, self.parameters, strict=True)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
