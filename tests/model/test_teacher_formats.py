"""Weight files as people have them: transformers' folders and the authors' own files, against the same network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prx_model.teacher_weights import load_timm

DINOV3, DINOV2 = "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"
GATED = "vit_small_plus_patch16_dinov3"
SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_register_tokens": 4}


def transformers_model(kind: str, *, biases: bool = False) -> nn.Module:
    """Of timm's small sizes, with weights that every part of the network has a say in."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, DINOv3ViTConfig, DINOv3ViTModel

    if kind == DINOV2:
        model: nn.Module = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518, **SIZES))
    else:
        gate = {"use_gated_mlp": True, "hidden_act": "silu"} if kind == GATED else {}
        model = DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, intermediate_size=1536, **SIZES, **gate))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.08, generator=generator)
            if "norm" in name or "lambda1" in name:
                parameter.add_(1.0)
            if kind != DINOV2 and not biases and name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.zero_()
    return model.eval()


def same_tokens(network: nn.Module, model: nn.Module, size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected: Tensor = model(image).last_hidden_state
        found: Tensor = network.eval().forward_features(image)  # type: ignore[operator]
    assert expected.std() > 0.5, "else the networks could differ unseen"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), [(DINOV3, (96, 64)), (GATED, (64, 96)), (DINOV2, (56, 42))])
def test_a_folder_of_transformers_gives_the_tokens_of_transformers(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    """Class token, registers and patches behind the last norm, on a grid that is no square."""
    model = transformers_model(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert "embeddings.cls_token" in load_file(tmp_path / "model.safetensors")
    same_tokens(load_timm(name, str(tmp_path)), model, size)


def test_transformers_biases_are_kept_by_the_network_that_has_them_and_refused_by_the_other(tmp_path: Path) -> None:
    model = transformers_model(DINOV3, biases=True)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    same_tokens(load_timm(f"{DINOV3}_qkvb", str(tmp_path)), model, (64, 64))
    with pytest.raises(ValueError, match=f"biases that {DINOV3} leaves out.*take {DINOV3}_qkvb"):
        load_timm(DINOV3, str(tmp_path))


def authors_dinov3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights as their authors' file holds them, with what only pretraining needs."""
    names = (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"), ("reg_token", "storage_tokens"))
    written = {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for key, value in state.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        written[key] = value
        if key.endswith("qkv.weight"):
            bias = torch.zeros(3 * 384)
            bias[384:768] = 0.7  # of keys: masked
            written[key.replace("weight", "bias")] = bias
            written[key.replace("weight", "bias_mask")] = torch.ones(3 * 384)
    return written


def test_the_authors_dinov3_file_is_read_whole_and_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_timm(DINOV3, "random").state_dict()
    torch.save(authors_dinov3(state), tmp_path / "dinov3.pth")
    loaded = load_timm(DINOV3, str(tmp_path / "dinov3.pth")).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    assert capsys.readouterr().out == ""


def test_the_authors_dinov2_file_is_read_whole(tmp_path: Path) -> None:
    """It adds the class token's position in the network; timm holds the sum."""
    state = load_timm(DINOV2, "random").state_dict()
    position = torch.full((1, 1, 384), 0.25)
    written = dict(state) | {"mask_token": torch.zeros(1, 384), "register_tokens": state["reg_token"]}
    written |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    del written["reg_token"]
    torch.save(written, tmp_path / "dinov2.pth")
    loaded = load_timm(DINOV2, str(tmp_path / "dinov2.pth")).state_dict()
    assert all(torch.allclose(value, loaded[key], atol=1e-6) for key, value in state.items())


def test_a_file_that_cannot_be_converted_is_a_sentence(tmp_path: Path) -> None:
    """Registers without positions: the conversion itself fails."""
    tensors = {"mask_token": torch.zeros(1, 384), "register_tokens": torch.zeros(1, 4, 384)}
    save_file(tensors | {"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=f"odd.safetensors' does not hold the weights of {DINOV2}"):
        load_timm(DINOV2, str(tmp_path / "odd.safetensors"))
