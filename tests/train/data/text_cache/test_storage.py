"""Formats of one byte: how much they change tokens and the loss, and what they cannot hold."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prx_model.packed_text import PackedText
from train.data import text_cache
from train.data.text_cache import Encoding, ShardWriter, dequantise, quantise
from train.learner.build import build
from train.precompute_text import precompute
from train.recipes import Recipe

from ..picture_files import sentence
from .caches import ALONE, CPU, all_captions, cached, make_recipe


@pytest.mark.parametrize(("storage", "measured"), [("fp8", 0.9995), ("int8", 0.9999)])
def test_quantised_tokens_keep_their_direction(storage: text_cache.Storage, measured: float) -> None:
    """At the encoder's width, normal features: the least cosine of 500 tokens, and of the whole."""
    tokens = torch.randn(500, 2304, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 500)[:, None]
    tokens = tokens.to(torch.bfloat16)
    stored, scale = quantise(tokens, storage)
    assert stored.element_size() == 1
    back = dequantise(stored, scale)
    assert back.dtype == torch.bfloat16
    cosine = F.cosine_similarity(back.double(), tokens.double())
    assert measured < float(cosine.min()) < 1
    assert float((back.double().norm(dim=1) / tokens.double().norm(dim=1) - 1).abs().max()) < 0.01


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_token_of_zeros_stays_zero(storage: text_cache.Storage) -> None:
    assert torch.equal(dequantise(*quantise(torch.zeros(2, 8), storage)), torch.zeros(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_cache_of_half_the_size_changes_the_loss_little(
    recipe: Recipe, encoder: Path, data: Path, tmp_path: Path, storage: str
) -> None:
    small = make_recipe(encoder, data, tmp_path / "cache", "--text.storage", storage)
    precompute(small, ALONE, shard_tokens=100)
    texts = list(dict.fromkeys(all_captions(recipe)))
    (exact, _), (rounded, _) = cached(recipe).encode(texts), cached(small).encode(texts)
    assert F.cosine_similarity(exact.float(), rounded.float()).min() >= 0.999
    assert not torch.equal(exact, rounded)
    losses = [loss_of(made, texts[:12]) for made in (recipe, small)]
    # A relative error of at most sqrt(2·(1 - 0.999)) = 4.5 % a token, and text is part of what the loss depends on.
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def loss_of(recipe: Recipe, captions: list[str]) -> float:
    modules = build(recipe, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in modules.model.parameters():
            parameter.normal_(std=0.1, generator=generator)
        image = torch.randn(len(captions), 3, 8, 8, generator=generator)
        text = modules.text(captions)
        assert isinstance(text, PackedText)
        out = modules.model(image, torch.rand(len(captions), generator=generator), text)
        return float((out - image).square().mean())


def test_features_that_a_format_cannot_hold_are_refused_with_one_that_can(tmp_path: Path) -> None:
    """One feature 300 times the others: int8's step is more than they are."""
    tokens = torch.randn(4, 2304, generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = 300.0
    writer = ShardWriter(tmp_path, Encoding("t", "", 8, "int8"), 0)
    message = sentence(lambda: writer.add(["a"], tokens.to(torch.bfloat16), [4]))
    assert message.startswith("text.storage 'int8' changes a token to a cosine of 0.99")
    assert message.endswith("take --text.storage bf16 or fp8")
    ShardWriter(tmp_path / "fp8", Encoding("t", "", 8, "fp8"), 0).add(["a"], tokens.to(torch.bfloat16), [4])


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_caption(
    tmp_path: Path, storage: text_cache.Storage, odd: float
) -> None:
    tokens = torch.ones(5, 8, dtype=torch.bfloat16)
    tokens[3, 2] = odd
    with ShardWriter(tmp_path, Encoding("t5", "", 8, storage), 0) as writer:
        message = sentence(lambda: writer.add(["good", "", "odd"], tokens, [2, 0, 3]))
    assert message == "'t5' encodes the caption 'odd' to values that are not finite"
