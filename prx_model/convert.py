"""Weights from and to other code bases: the PRX repository's names, and transformers' T5 for the byte tower.

The denoiser needs no conversion to diffusers: its names are diffusers' names.
"""

import re

from torch import Tensor

from .wrappers import unwrapped

# docs/recipe.md, "Model": names of the PRX repository on the left, of diffusers (and ours) on the right.
_PRX_REPOSITORY = (
    (r"^(blocks\.\d+)\.img_qkv_proj\.", r"\1.attention.img_qkv_proj."),
    (r"^(blocks\.\d+)\.txt_kv_proj\.", r"\1.attention.txt_kv_proj."),
    (r"^(blocks\.\d+)\.qk_norm\.query_norm\.scale$", r"\1.attention.norm_q.weight"),
    (r"^(blocks\.\d+)\.qk_norm\.key_norm\.scale$", r"\1.attention.norm_k.weight"),
    (r"^(blocks\.\d+)\.k_norm\.scale$", r"\1.attention.norm_added_k.weight"),
    (r"^(blocks\.\d+)\.attn_out\.", r"\1.attention.to_out.0."),
)


def from_prx_repository(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the public PRX repository to the names of `PRXTransformer` (and of diffusers).

    A leading `denoiser.` and what wrappers add are taken off; names that are already right stay.

    Raises:
        ValueError: two names would become one.
    """
    renamed = {}
    for name, tensor in unwrapped(state).items():
        name = re.sub(r"^(?:denoiser\.)+", "", name)
        for pattern, replacement in _PRX_REPOSITORY:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def byte_tower_to_t5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `ByteTower` state dict to that of transformers' `T5EncoderModel` (gated-gelu feed-forward)."""
    fixed = {
        "embedding.weight": "shared.weight",
        "relative_bias.weight": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "final_norm.weight": "encoder.final_layer_norm.weight",
    }
    layers = {
        "norm_attention": "layer.0.layer_norm",
        "q": "layer.0.SelfAttention.q",
        "k": "layer.0.SelfAttention.k",
        "v": "layer.0.SelfAttention.v",
        "o": "layer.0.SelfAttention.o",
        "norm_mlp": "layer.1.layer_norm",
        "gate": "layer.1.DenseReluDense.wi_0",
        "up": "layer.1.DenseReluDense.wi_1",
        "down": "layer.1.DenseReluDense.wo",
    }
    renamed = {}
    for name, tensor in state.items():
        if name in fixed:
            renamed[fixed[name]] = tensor
        else:
            _, block, layer, _ = name.split(".")
            renamed[f"encoder.block.{block}.{layers[layer]}.weight"] = tensor
    return renamed
