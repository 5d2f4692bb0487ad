"""What networks of timm compute without looking at the picture is made once, and is what unmodified timm makes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prx_model.teacher_constants import Features, ImageNet, RotaryTables, fix_size, rotary_table
from prx_model.teacher_weights import load_timm
from prx_model.teachers import REPA, PerceptualDINO

DINOV3, DINOV2 = "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"
DTYPES = [torch.float32, torch.bfloat16]
GRIDS = [(2, 3), (3, 2), (4, 4)]


def frozen(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A small network and unmodified timm's with the same weights, as teachers hold them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network: Any = load_timm(name, "random")
    network.blocks = network.blocks[:3]
    for parameter in network.parameters():  # scales of layers start near zero, and would hide what blocks do
        nn.init.normal_(parameter, std=0.2)
    network.to(dtype).eval().requires_grad_(False)
    return network, copy.deepcopy(network)


def pictures(height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_with_kept_tables_are_unmodified_timms_bit_for_bit(dtype: torch.dtype) -> None:
    network, unmodified = frozen(DINOV3, dtype)
    features = Features(network)
    for rows, columns in (*GRIDS, *GRIDS):
        image = pictures(16 * rows, 16 * columns, dtype)
        found = features.forward(image, *rotary_table(network, 16 * rows, 16 * columns))
        assert torch.equal(found, unmodified.forward_features(image))
        assert torch.equal(network.forward_features(image), found), "asked directly too"
    upright, lying = (network.rope.table(*grid) for grid in GRIDS[:2])
    assert not torch.equal(upright, lying)
    assert upright.dtype == unmodified.rope.get_embed(shape=GRIDS[0]).dtype


def test_a_table_is_made_once_for_a_grid_and_again_after_a_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    network, unmodified = frozen(DINOV3, torch.float32)
    features = Features(network)
    assert isinstance(network.rope, RotaryTables)
    made: list[tuple[int, int]] = []
    ask = network.rope.embedding.get_embed
    monkeypatch.setattr(network.rope.embedding, "get_embed", lambda shape: made.append(shape) or ask(shape=shape))
    for rows, columns in (*GRIDS, *GRIDS):
        image = pictures(16 * rows, 16 * columns, torch.float32)
        features.forward(image, *rotary_table(network, 16 * rows, 16 * columns))
    assert made == GRIDS
    network.double()
    table = network.rope.table(2, 3)
    assert made == [*GRIDS, (2, 3)]
    assert torch.equal(table, unmodified.double().rope.get_embed(shape=(2, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_resampled_once_give_unmodified_timms_features_bit_for_bit(dtype: torch.dtype) -> None:
    network, unmodified = frozen(DINOV2, dtype)
    fix_size(network, 56, 84)
    image = pictures(56, 84, dtype)
    assert torch.equal(network.forward_features(image), unmodified.forward_features(image))
    assert network.pos_embed.shape[1] == 4 * 6
    assert not network.pos_embed.requires_grad


def test_pdinos_network_holds_positions_of_its_size() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pdino = PerceptualDINO(name=DINOV2, weights="random", size=28)
    assert pdino.network.pos_embed.shape[1] == 4


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_normalisation_is_the_formula_in_the_pictures_dtype(dtype: torch.dtype) -> None:
    image = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, std = (image.new_tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(ImageNet()(image), (image - mean) / std)


def test_constants_are_no_part_of_what_is_trained_or_saved() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repa = REPA(8, name=DINOV3, weights="random")
    assert {name.split(".")[0] for name in repa.state_dict()} == {"projector"}
    assert {name.split(".")[0] for name, _ in repa.named_parameters()} == {"projector"}
