"""TREAD token routing for the models that people train: a table model -> the one call, proven by `route.verify`.

python examples/route_models.py          # proves each of diffusers' classes, small, with random weights
python examples/route_models.py Flux     # one of them

Block 0 and the last stay dense, half of the image tokens bypass the others. Of two-stream models the image stream is
routed; text stays whole. Models of public code that no package installs are proven in this repository's tests on twins
of their structure. Another model: write the call without `per_token`, run `route.verify`, and copy what it says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])
from examples.small_models import build, run  # noqa: E402
from prx_kernels import Entries, Route, route_blocks  # noqa: E402

Calls = dict[str, Callable[[Any], Route]]

# A table that all samples share asks for one set of tokens for all of them: shared=True. Text's entries stand ahead of
# the image's in one table (prefix="rest"), or behind them (suffix="rest").
DIFFUSERS: Calls = {
    "PRX": lambda m: route_blocks(m.blocks, 1, -2, 0.5, per_token={"image_rotary_emb": 2}),
    "DiT": lambda m: route_blocks(m.transformer_blocks, 1, -2, 0.5),
    "PixArt": lambda m: route_blocks(m.transformer_blocks, 1, -2, 0.5),
    "SD3": lambda m: route_blocks(m.transformer_blocks, 1, -2, 0.5, out=1),
    "Flux": lambda m: route_blocks(
        m.transformer_blocks, 1, -2, 0.5, out=1, per_token={"image_rotary_emb": Entries(0, prefix="rest")}, shared=True
    ),
    "Chroma": lambda m: route_blocks(
        m.transformer_blocks, 1, -2, 0.5, out=1, per_token={"image_rotary_emb": Entries(0, prefix="rest")}, shared=True
    ),
    "QwenImage": lambda m: route_blocks(  # the table is a pair, of the image and of the text
        m.transformer_blocks, 1, -2, 0.5, out=1, per_token={"image_rotary_emb": {0: 0}}, shared=True
    ),
    "AuraFlow": lambda m: route_blocks(m.joint_transformer_blocks, 1, -2, 0.5, out=1),
    "CogView4": lambda m: route_blocks(
        m.transformer_blocks, 1, -2, 0.5, out=0, per_token={"image_rotary_emb": 0}, shared=True
    ),
    "CogVideoX": lambda m: route_blocks(m.transformer_blocks, 1, -2, 0.5, out=0),
    "HunyuanDiT": lambda m: route_blocks(m.blocks, 1, -2, 0.5, per_token={"image_rotary_emb": 0}, shared=True),
    "HunyuanVideo": lambda m: route_blocks(
        m.transformer_blocks, 1, -2, 0.5, out=0, shared=True,
        per_token={"attention_mask": Entries(3, suffix="rest"), "freqs_cis": 0},
    ),
    "LTXVideo": lambda m: route_blocks(m.transformer_blocks, 1, -2, 0.5, per_token={"image_rotary_emb": 1}),
    "Wan": lambda m: route_blocks(m.blocks, 1, -2, 0.5, per_token={"rotary_emb": 1}),
    # Text is in the stream and routed with it.
    "Lumina2": lambda m: route_blocks(m.layers, 1, -2, 0.5, per_token={"image_rotary_emb": 1}),
    "ZImage": lambda m: route_blocks(m.layers, 1, -2, 0.5, per_token={"freqs_cis": 1, "attn_mask": 1}),
}  # fmt: skip

# Public code, by the repository where it is.
PUBLIC: Calls = {
    # willisma/SiT; facebookresearch/DiT the same
    "SiT": lambda m: route_blocks(m.blocks, 1, -2, 0.5),
    # sihyun-yu/REPA: behind the block whose tokens the projectors read
    "REPA": lambda m: route_blocks(m.blocks, m.encoder_depth, -2, 0.5),
    # hustvl/LightningDiT, with its use_checkpoint too
    "LightningDiT": lambda m: route_blocks(m.blocks, 1, -2, 0.5, per_token={"feat_rope": 0}, shared=True),
    # LTH14/JiT: from the block where its class tokens have joined
    "JiT": lambda m: route_blocks(
        m.blocks, m.in_context_start, -2, 0.5, per_token={"feat_rope": 0}, shared=True, prefix=m.in_context_len
    ),
    # MCG-NJU/DDT: its encoder, and its decoder, whose condition has a vector for each token
    "DDT": lambda m: route_blocks(
        m.blocks[: m.num_encoder_blocks], 1, -2, 0.5, per_token={"pos": 0}, shared=True
    ),
    "DDT, decoder": lambda m: route_blocks(
        m.blocks[m.num_encoder_blocks :], 0, -2, 0.5, per_token={"pos": 0, "c": 1}, shared=True
    ),
    # bytetriper/RAE: DiTwDDTHead
    "RAE": lambda m: route_blocks(
        m.blocks[: m.num_encoder_blocks], 1, -2, 0.5, per_token={"feat_rope": 0}, shared=True
    ),
    # MCG-NJU/PixNerd, of classes; of text, m.num_encoder_blocks
    "PixNerd": lambda m: route_blocks(m.blocks[: m.num_cond_blocks], 1, -2, 0.5, per_token={"pos": 0}, shared=True),
    # baofff/U-ViT: a start and an end that lie alike, so that every skip ends where it begins; time and label ahead
    "U-ViT": lambda m: route_blocks([*m.in_blocks, m.mid_block, *m.out_blocks], 1, -2, 0.5, prefix=m.extras),
    # SwayStar123/SpeedrunDiT, in place of its own dropping: m.sprint_drop_ratio = 0.0 first; the class token is ahead.
    # Its rotary module is read at rope_ids, and what a block notes (v_last) is no table.
    "SpeedrunDiT": lambda m: route_blocks(
        m.blocks, m.num_f, -1 - m.num_h, 0.5, prefix=1,
        per_token={"rope_ids": 1, "v1": 2, "feat_rope": None, "attn.v_last": None},
    ),
    # black-forest-labs/flux: text joins the image between the two kinds of block
    "Flux by BFL": lambda m: route_blocks(
        [*m.double_blocks, *m.single_blocks], 1, -2, 0.5, tokens=("img", "x"), out=(0, None), prefix=(0, "rest"),
        per_token={"pe": Entries(2, prefix="rest")},
    ),
    # pytorch/torchtitan: the same with tokens in dimension 1 of the table
    "Flux by torchtitan": lambda m: route_blocks(
        [*m.double_blocks, *m.single_blocks], 1, -2, 0.5, tokens=("img", "x"), out=(0, None), prefix=(0, "rest"),
        per_token={"pe": Entries(1, prefix="rest")},
    ),
}  # fmt: skip


def route(name: str, model: Any) -> Route:
    """Route a model as the table says.

    Raises:
        ValueError: the table has no such name.
    """
    calls = DIFFUSERS | PUBLIC
    if name not in calls:
        raise ValueError(f"unknown model {name!r}, known are {', '.join(calls)}")
    return calls[name](model)


def main() -> None:
    for name in sys.argv[1:] or DIFFUSERS:
        torch.manual_seed(0)
        model, arguments = build(name)
        print(f"{name}: {route(name, model).verify(lambda: run(model, arguments))}")  # noqa: B023


if __name__ == "__main__":
    main()
