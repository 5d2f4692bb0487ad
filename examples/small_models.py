"""Small models of diffusers' classes with random weights, and inputs for them: what `route_models.py` proves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
SMALL: dict[str, Any] = {**HEADS, "num_layers": 4, "in_channels": 4}
GRID: dict[str, Any] = {**SMALL, "sample_size": 8, "patch_size": 2}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model called `name` and the arguments of its forward: 16 image tokens a sample, 32 of CogVideoX and Wan.

    Output layers that begin at zero are random, so that a wrong route shows.
    """
    model, arguments = (_image_model if name in ONE_PICTURE else _other_model)(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, arguments


ONE_PICTURE = ("PRX", "DiT", "PixArt", "SD3", "AuraFlow", "CogView4", "HunyuanDiT", "Lumina2", "ZImage")
"""Models that take pictures (batch, channels, height, width)."""


def _image_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers

    picture = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10.0, 500.0])}
    text = {"encoder_hidden_states": torch.randn(2, 5, 12)}
    everything = torch.ones(2, 5, dtype=torch.bool)
    if name == "PRX":
        sizes = {"context_in_dim": 12, "hidden_size": 32, "num_heads": 2, "depth": 4, "axes_dim": [8, 8]}
        return diffusers.PRXTransformer2DModel(in_channels=4, patch_size=2, **sizes), {**picture, **text}
    if name == "DiT":
        model = diffusers.DiTTransformer2DModel(**GRID, num_embeds_ada_norm=1000, norm_num_groups=1)
        return model, {**picture, "timestep": torch.tensor([10, 500]), "class_labels": torch.tensor([1, 2])}
    if name == "PixArt":
        sizes = {"cross_attention_dim": 32, "caption_channels": 12, "use_additional_conditions": False}
        conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return diffusers.PixArtTransformer2DModel(**GRID, **sizes), {**picture, **text, **conditions}
    if name == "SD3":
        sizes = {"joint_attention_dim": 12, "caption_projection_dim": 32, "pooled_projection_dim": 12}
        pooled = {"pooled_projections": torch.randn(2, 12)}
        return diffusers.SD3Transformer2DModel(**GRID, **sizes), {**picture, **text, **pooled}
    if name == "AuraFlow":
        sizes = {"num_mmdit_layers": 4, "num_single_dit_layers": 1, "joint_attention_dim": 12}
        sizes |= {"caption_projection_dim": 32, "pos_embed_max_size": 64, "sample_size": 8, "in_channels": 4}
        return diffusers.AuraFlowTransformer2DModel(**HEADS, **sizes), {**picture, **text}
    if name == "CogView4":
        sizes = {"text_embed_dim": 12, "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (8, 8)}
        model = diffusers.CogView4Transformer2DModel(**SMALL, **sizes, out_channels=4, sample_size=8)
        square = torch.full((2, 2), 8.0)
        places = {"original_size": square, "target_size": square, "crop_coords": torch.zeros(2, 2)}
        return model, {**picture, **text, **places}
    if name == "HunyuanDiT":
        sizes = {"hidden_size": 32, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 5}
        sizes |= {"pooled_projection_dim": 16, "text_len_t5": 5, "use_style_cond_and_image_meta_size": False}
        texts = {"encoder_hidden_states": torch.randn(2, 5, 16), "encoder_hidden_states_t5": torch.randn(2, 5, 16)}
        masks = {"text_embedding_mask": torch.ones(2, 5), "text_embedding_mask_t5": torch.ones(2, 5)}
        table = {"image_rotary_emb": (torch.randn(16, 16), torch.randn(16, 16))}
        return diffusers.HunyuanDiT2DModel(**GRID, **sizes), {**picture, **texts, **masks, **table}
    if name == "ZImage":  # lists of pictures (channels, frames, height, width) and of texts, each of its own length
        sizes = {"dim": 32, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12}
        sizes |= {"axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
        pictures, texts = [torch.randn(4, 1, 8, 8) for _ in range(2)], [torch.randn(5, 12), torch.randn(40, 12)]
        model = diffusers.ZImageTransformer2DModel(in_channels=4, **sizes)
        return model, {"x": pictures, "t": torch.tensor([0.1, 0.7]), "cap_feats": texts}
    sizes = {"hidden_size": 32, "num_layers": 4, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    sizes |= {"multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (64, 32, 32), "cap_feat_dim": 12}
    model = diffusers.Lumina2Transformer2DModel(sample_size=8, in_channels=4, **sizes)
    return model, {**picture, **text, "encoder_attention_mask": everything}


def _other_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Models of video, and those that take packed latents (batch, tokens, channels)."""
    import diffusers

    packed = {"hidden_states": torch.randn(2, 16, 16), "timestep": torch.tensor([0.01, 0.5])}
    text, timestep = {"encoder_hidden_states": torch.randn(2, 5, 12)}, {"timestep": torch.tensor([10, 500])}
    pooled = {"pooled_projections": torch.randn(2, 12)}
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = {"img_ids": torch.stack((0 * rows, rows, columns), dim=-1).flatten(0, 1), "txt_ids": torch.zeros(5, 3)}
    axes = {"axes_dims_rope": (4, 6, 6)}
    latents: dict[str, Any] = {**HEADS, "num_layers": 4, "in_channels": 16, "joint_attention_dim": 12, **axes}
    if name == "Flux":
        model = diffusers.FluxTransformer2DModel(**latents, num_single_layers=1, pooled_projection_dim=12)
        return model, {**packed, **text, **pooled, **places}
    if name == "Chroma":
        guide = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
        model = diffusers.ChromaTransformer2DModel(**latents, **guide, num_single_layers=1)
        return model, {**packed, **text, **places}
    if name == "QwenImage":
        shapes = {"encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool), "img_shapes": [[(1, 4, 4)]] * 2}
        return diffusers.QwenImageTransformer2DModel(**latents, out_channels=4), {**packed, **text, **shapes}
    if name == "CogVideoX":
        sizes = {"time_embed_dim": 8, "text_embed_dim": 12, "max_text_seq_length": 5, "out_channels": 4}
        sizes |= {"sample_width": 8, "sample_height": 8, "sample_frames": 5}
        model = diffusers.CogVideoXTransformer3DModel(**SMALL, **sizes)
        return model, {"hidden_states": torch.randn(2, 2, 4, 8, 8), **timestep, **text}
    if name == "HunyuanVideo":
        sizes = {"num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 12, "pooled_projection_dim": 12}
        model = diffusers.HunyuanVideoTransformer3DModel(**SMALL, **sizes, out_channels=4, rope_axes_dim=(4, 6, 6))
        more = {"encoder_attention_mask": torch.ones(2, 5), "guidance": torch.full((2,), 1000.0)}
        return model, {"hidden_states": torch.randn(2, 4, 1, 8, 8), **timestep, **text, **pooled, **more}
    if name == "LTXVideo":
        model = diffusers.LTXVideoTransformer3DModel(
            **SMALL, out_channels=4, cross_attention_dim=32, caption_channels=12
        )
        video = {"hidden_states": torch.randn(2, 16, 4), "num_frames": 1, "height": 4, "width": 4}
        return model, {**video, **timestep, **text, "encoder_attention_mask": torch.ones(2, 5)}
    if name == "Wan":
        sizes = {"text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "out_channels": 4, "rope_max_seq_len": 32}
        model = diffusers.WanTransformer3DModel(**SMALL, **sizes)
        return model, {"hidden_states": torch.randn(2, 4, 2, 8, 8), **timestep, **text}
    raise ValueError(f"no small {name!r} is made here")


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    out = model(**arguments, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out
