"""Training cannot tell a cache from encoding online."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prx_model.text import T5GemmaTower
from train.data.loader import Batch
from train.data.text_cache import CachedText
from train.loop import Trainer
from train.recipes import Recipe
from train.run.trained import load_trained

from .caches import ALONE, CAPTIONS, CPU, WIDTH, all_captions, cached, tower


def test_cached_embeddings_are_those_of_encoding_online_bit_for_bit(recipe: Recipe, encoder: Path) -> None:
    texts = list(dict.fromkeys(all_captions(recipe)))
    source, online = cached(recipe), tower(encoder)
    for seed in range(4):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = [texts[i] for i in order[:7]] + ["", texts[order[0]]]
        (stored, lengths), (encoded, online_lengths) = source.encode(batch), online.encode(batch)
        assert lengths == online_lengths
        assert stored.dtype == encoded.dtype == torch.bfloat16
        assert torch.equal(stored, encoded)


def test_loss_and_gradients_are_those_of_encoding_online_bit_for_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cache in (recipe.text.cache, ""):
        made = replace(
            recipe,
            text=replace(recipe.text, cache=cache),
            output=replace(recipe.output, folder=str(tmp_path / ("cached" if cache else "online"))),
            flow=replace(recipe.flow, caption_drop=0.4),
        )
        trainer = Trainer(made, ALONE)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the head is zero at the start: text would not reach the loss
            for _, parameter in trainer.learner.parameters:
                parameter.normal_(std=0.1, generator=generator)
        if cache:
            assert isinstance(trainer.learner.modules.tower, CachedText)
            monkeypatch.setattr(T5GemmaTower, "forward", lambda *_: pytest.fail("the encoder was used"))
        image = torch.randint(0, 256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
        positions = torch.arange(8)
        loss, *_ = trainer.learner._loss(Batch(image, list(all_captions(recipe))[:8], positions, positions), 0)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in trainer.learner.parameters}))
        monkeypatch.undo()
    (loss, gradients), (online_loss, online_gradients) = results
    assert torch.equal(loss, online_loss)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, online_gradients[name]), name
    text_gradient = gradients["model.txt_in.weight"]
    assert text_gradient is not None
    assert text_gradient.norm() > 0


def test_a_run_from_the_cache_evaluates_and_draws_and_its_model_any_prompt(recipe: Recipe, tmp_path: Path) -> None:
    small = replace(
        recipe,
        output=replace(recipe.output, folder=str(tmp_path)),
        evaluation=replace(recipe.evaluation, grid=2),
        sampling=replace(recipe.sampling, steps=2),
    )
    outcome = Trainer(small, ALONE).run()
    assert outcome.finished
    assert outcome.grid is not None
    size = f"{small.data.height}x{small.data.width}"
    assert outcome.scores[f"ema/loss/{size}"] > 0
    # A prompt of one's own is in no cache: the encoder is loaded to draw it.
    modules = load_trained(outcome.folder, CPU).modules
    assert isinstance(modules.tower, T5GemmaTower)
    assert modules.encode(["a prompt nobody cached"])[0].shape[2] == WIDTH


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_embeddings_do_not_depend_on_the_batch_on_a_gpu(encoder: Path) -> None:
    """What equality of cache and online encoding rests on: products of fixed shapes treat their rows alike."""
    online = tower(encoder).cuda()
    texts = [text for text in CAPTIONS if text]
    together = dict(zip(texts, (part.clone() for part in split(online, texts)), strict=True))
    for seed in range(8):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = [texts[i] for i in order[: 1 + 2 * seed]]
        for text, part in zip(batch, split(online, batch), strict=True):
            assert torch.equal(part, together[text])


def split(online: T5GemmaTower, texts: list[str]) -> tuple[Tensor, ...]:
    tokens, lengths = online.encode(texts)
    return tokens.split(lengths)
