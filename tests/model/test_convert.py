"""Weights of the public PRX repository under our names, and back: no tensor lost, renamed twice or mixed up."""

import pytest
import torch

from prx_model import PRXConfig, PRXTransformer
from prx_model.convert import from_prx_repository

CONFIG = PRXConfig(patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=12, axes_dim=(8, 8))

# docs/recipe.md, "Parameter names", written out for one block: the repository's name, and ours.
BLOCK = {
    "img_qkv_proj.weight": "attention.img_qkv_proj.weight",
    "txt_kv_proj.weight": "attention.txt_kv_proj.weight",
    "qk_norm.query_norm.scale": "attention.norm_q.weight",
    "qk_norm.key_norm.scale": "attention.norm_k.weight",
    "k_norm.scale": "attention.norm_added_k.weight",
    "attn_out.weight": "attention.to_out.0.weight",
    "gate_proj.weight": "gate_proj.weight",
    "up_proj.weight": "up_proj.weight",
    "down_proj.weight": "down_proj.weight",
    "modulation.lin.weight": "modulation.lin.weight",
    "modulation.lin.bias": "modulation.lin.bias",
}


def repository_names() -> dict[str, str]:
    """Our name of every parameter, with the repository's name for it."""
    outside = [name for name in PRXTransformer(CONFIG).state_dict() if not name.startswith("blocks.")]
    blocks = {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(12) for theirs, ours in BLOCK.items()}
    return {name: name for name in outside} | blocks


@pytest.mark.parametrize("prefix", ["", "denoiser.", "module.denoiser.", "denoiser.module."])
def test_repository_weights_load_strictly_and_each_lands_in_its_place(prefix: str) -> None:
    source, target = PRXTransformer(CONFIG), PRXTransformer(CONFIG)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    names = repository_names()
    theirs = {prefix + names[name]: tensor for name, tensor in source.state_dict().items()}
    assert len(theirs) == len(source.state_dict())
    target.load_state_dict(from_prx_repository(theirs), strict=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_our_own_names_stay_as_they_are() -> None:
    state = PRXTransformer(CONFIG).state_dict()
    renamed = from_prx_repository(state)
    assert list(renamed) == list(state)
    assert all(renamed[name] is tensor for name, tensor in state.items())


def test_unknown_names_are_kept_so_that_a_strict_load_reports_them() -> None:
    model = PRXTransformer(CONFIG)
    state = from_prx_repository(model.state_dict() | {"blocks.0.extra.scale": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.extra\.scale"):
        model.load_state_dict(state, strict=True)
