"""Swap the patch embedding of a small pixel-space DiT, one line each, and train it without storing noise or x_t.

python examples/patch_embed_dit.py     # random weights: equality with what was replaced, then ten training steps
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).resolve().parents[1])
from prx_kernels import BottleneckPatchEmbed, philox_normal, unpatchify, x_prediction_loss  # noqa: E402

# The lines. Weights are copied; the state dict then holds "0.weight" … as a Sequential of Linear maps would.


def replace_timm(model: DiT) -> None:
    model.x_embedder = BottleneckPatchEmbed.from_timm(model.x_embedder)


def replace_convolutions(model: DiT) -> None:
    model.x_embedder = BottleneckPatchEmbed.from_conv(model.x_embedder.proj1, model.x_embedder.proj2)


REPLACE = {"timm": replace_timm, "convolutions": replace_convolutions}


# --- a small model with random weights ---------------------------------------------------------------------------


class TwoConvolutions(nn.Module):
    """The shape of JiT's embedding (https://arxiv.org/abs/2511.13720): p×p without bias, then 1×1."""

    def __init__(self, patch: int, bottleneck: int, hidden: int) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.proj1 = nn.Conv2d(3, bottleneck, patch, stride=patch, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """adaLN-zero would be modulated from t too; a small model adds t to its tokens instead."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(hidden), nn.MultiheadAttention(hidden, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class DiT(nn.Module):
    def __init__(self, x_embedder: nn.Module, hidden: int = 64) -> None:
        super().__init__()
        self.x_embedder = x_embedder
        self.t_embedder = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.final_layer = nn.Linear(hidden, 3 * x_embedder.patch_size[0] ** 2)

    def tokens(self, image: Tensor, t: Tensor, **noise: Tensor) -> Tensor:
        """The predicted clean picture in patches; with `noise_seed`, image is clean and noised while it is read."""
        x = self.x_embedder(image, t=t, **noise) if noise else self.x_embedder(image)
        x = x + self.t_embedder(t[:, None])[:, None]
        for block in self.blocks:
            x = block(x)
        return self.final_layer(x)

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        return unpatchify(self.tokens(image, t), self.x_embedder.patch_size[0], image.shape[2], image.shape[3])


def build(name: str) -> DiT:
    """A DiT for 32-pixel pictures in patches of 8, with the embedding called `name`."""
    if name == "timm":
        from timm.layers import PatchEmbed

        return DiT(PatchEmbed(img_size=32, patch_size=8, in_chans=3, embed_dim=64))
    return DiT(TwoConvolutions(8, 16, 64))


# --- the two ways to train ---------------------------------------------------------------------------------------


def loss_before(model: DiT, image: Tensor, t: Tensor, seed: Tensor) -> Tensor:
    """As a trainer without this package has it: noise, x_t, two velocities and a picture put together, all stored."""
    x0, level = image.float() / 127.5 - 1, t[:, None, None, None]
    x_t = (1 - level) * x0 + level * philox_normal(seed, tuple(image.shape))
    divisor = level.clamp(min=0.05)
    return F.mse_loss((x_t - model(x_t, t)) / divisor, (x_t - x0) / divisor)


def loss_after(model: DiT, image: Tensor, t: Tensor, seed: Tensor) -> Tensor:
    """The same loss from bytes: nothing of the picture's size but the prediction and its gradient."""
    return x_prediction_loss(model.tokens(image, t, noise_seed=seed), image, t, 8)


def main() -> None:
    for name, replace in REPLACE.items():
        torch.manual_seed(0)
        model = build(name)
        image, t, seed = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.rand(4), torch.tensor(0)
        with torch.no_grad():
            before = loss_before(model, image, t, seed)
            replace(model)
            after = loss_after(model, image, t, seed)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
        for step in range(10):
            loss = loss_after(model, image, t, torch.tensor(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{name:13}loss before {before:.5f}, after {after:.5f}; training {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
