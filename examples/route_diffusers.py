"""Add TREAD token routing to diffusers' transformers, one line each: `route = ROUTES[name](model)`.

python examples/route_diffusers.py     # trains one step of each on random weights and prints what was routed
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[0] = str(Path(__file__).resolve().parents[1])
from prx_kernels import Entries, Route, route_blocks  # noqa: E402

# The lines. Block 0 and the last stay dense, half of the image tokens bypass the others.


def route_prx(model: nn.Module) -> Route:
    return route_blocks(model.blocks, 1, len(model.blocks) - 2, 0.5, per_token={"image_rotary_emb": 2})


def route_dit(model: nn.Module) -> Route:
    return route_blocks(model.transformer_blocks, 1, len(model.transformer_blocks) - 2, 0.5)


def route_pixart(model: nn.Module) -> Route:
    return route_blocks(model.transformer_blocks, 1, len(model.transformer_blocks) - 2, 0.5)


def route_sd3(model: nn.Module) -> Route:
    return route_blocks(model.transformer_blocks, 1, len(model.transformer_blocks) - 2, 0.5, out=1)


def route_flux(model: nn.Module) -> Route:
    # One rotary table for the whole batch, the text's entries first: one set of tokens for the batch.
    tables = {"image_rotary_emb": Entries(0, prefix="rest")}
    return route_blocks(
        model.transformer_blocks, 1, len(model.transformer_blocks) - 2, 0.5, per_token=tables, out=1, shared=True
    )


ROUTES = {"PRX": route_prx, "DiT": route_dit, "PixArt": route_pixart, "SD3": route_sd3, "Flux": route_flux}


# --- small models with random weights, and inputs for them ------------------------------------------------------

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL: dict[str, Any] = {**HEADS, "num_layers": 4, "sample_size": 8, "patch_size": 2, "in_channels": 4}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model called `name` and the arguments of its forward, 16 image tokens a sample."""
    import diffusers

    arguments = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10, 500])}
    text = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    pooled = {"pooled_projections": torch.randn(2, 12)}
    if name == "PRX":
        sizes = {"context_in_dim": 12, "hidden_size": 32, "num_heads": 2, "depth": 4, "axes_dim": [8, 8]}
        return diffusers.PRXTransformer2DModel(in_channels=4, patch_size=2, **sizes), {**arguments, **text}
    if name == "DiT":
        model = diffusers.DiTTransformer2DModel(**SMALL, num_embeds_ada_norm=1000, norm_num_groups=1)
        return model, {**arguments, "class_labels": torch.tensor([1, 2])}
    if name == "PixArt":
        sizes = {"cross_attention_dim": 32, "caption_channels": 12, "use_additional_conditions": False}
        conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return diffusers.PixArtTransformer2DModel(**SMALL, **sizes), {**arguments, **text, **conditions}
    if name == "SD3":
        sizes = {"joint_attention_dim": 12, "caption_projection_dim": 32, "pooled_projection_dim": 12}
        return diffusers.SD3Transformer2DModel(**SMALL, **sizes), {**arguments, **text, **pooled}
    if name == "Flux":
        sizes = {"joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)}
        model = diffusers.FluxTransformer2DModel(**HEADS, in_channels=16, num_layers=4, num_single_layers=1, **sizes)
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        places = {"img_ids": torch.stack((0 * rows, rows, columns), dim=-1).flatten(0, 1), "txt_ids": torch.zeros(5, 3)}
        return model, {**arguments, "hidden_states": torch.randn(2, 16, 16), **text, **pooled, **places}
    raise ValueError(f"unknown model {name!r}, known are {', '.join(ROUTES)}")


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments, return_dict=False)[0]


def main() -> None:
    torch.manual_seed(0)
    for name, route_model in ROUTES.items():
        model, arguments = build(name)
        route = route_model(model.train())
        loss = run(model, arguments).square().mean()
        loss.backward()
        print(f"{name:8}{route}: loss {loss:.4f}, tokens kept in sample 0: {route.keep[0].tolist()}")


if __name__ == "__main__":
    main()
