"""Graphs are bounded: each preset's blocks have the stated number, whatever sizes, captions and batches come by."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from train.data.buckets import Size, bucket_sizes
from train.data.example import Example
from train.data.loader import Batch
from train.evaluation import evaluate
from train.learner import build
from train.learner.step import Learner
from train.ranks import graphs, parallel
from train.ranks.graphs import block_forms
from train.recipes import PRESETS, Compile, Parallel, Recipe, Routing, Text

STATED = {"shapes": 2, "scenes": 2, "pictograms": 2, "prx-512": 9, "prx-1024": 9}
README = Path(__file__).resolve().parents[3] / "train" / "README.md"


class Frozen(nn.Module):
    """In T5Gemma's place: a token of its own for every letter, one for an empty caption."""

    width = 32

    def encode(self, captions: list[str]) -> tuple[Tensor, list[int]]:
        lengths = [max(len(caption), 1) for caption in captions]
        generator = torch.Generator().manual_seed(sum(lengths))
        return torch.randn(sum(lengths), self.width, generator=generator), lengths


class Pictures:
    """Held-out pictures of one size."""

    def __init__(self, size: Size, count: int) -> None:
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> Example:
        return Example(np.full((*self.size, 3), position, np.uint8), "a" * position, f"{position}")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced through autograd and not made into code, which takes longer and changes none of them."""
    monkeypatch.setattr(graphs, "BACKEND", "aot_eager")
    monkeypatch.setattr(build, "frozen_tower", lambda text: Frozen())
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    parallel.finish()


def small(name: str, **sections: object) -> Recipe:
    """A preset with its grids of patches, buckets and kept tokens, and a small model on small patches."""
    preset = PRESETS[name]()
    assert isinstance(preset, Recipe)
    rows, columns = (side // preset.model.patch_size for side in (preset.data.height, preset.data.width))
    model = replace(
        preset.model, hidden_size=32, num_heads=1, axes_dim=(16, 16), depth=3, patch_size=4, context_in_dim=32,
        bottleneck_size=16,
    )  # fmt: skip
    recipe = replace(
        preset,
        model=model,
        data=replace(preset.data, height=4 * rows, width=4 * columns),
        text=Text(kind=preset.text.kind, max_tokens=preset.text.max_tokens, depth=1, num_heads=2),
        routing=replace(preset.routing, start=1, end=1),
        flow=replace(preset.flow, caption_drop=0.0),
        repa=replace(preset.repa, enabled=False),
        lpips=replace(preset.lpips, enabled=False),
        pdino=replace(preset.pdino, enabled=False),
        train=replace(preset.train, device="cpu"),
        sampling=replace(preset.sampling, steps=1),
        compile=Compile("yes"),
    )
    return replace(recipe, **sections)  # type: ignore[arg-type]


def sizes_of(recipe: Recipe) -> tuple[Size, ...]:
    data = recipe.data
    sizes = bucket_sizes(data.height, data.width, recipe.model.patch_size) if data.buckets else ()
    return sizes or ((data.height, data.width),)


def learner_of(recipe: Recipe) -> Learner:
    return Learner(recipe, parallel.start(recipe.train, recipe.parallel))


def a_batch(size: Size, captions: list[str]) -> Batch:
    count = len(captions)
    generator = torch.Generator().manual_seed(count)
    image = torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)
    return Batch(image, captions, torch.arange(count), torch.arange(count))


def train_on(learner: Learner, samples: int, sizes: tuple[Size, ...] = ()) -> None:
    """A forward and backward at every size: captions that are all dropped, of a letter, as long as can be, in turn."""
    longest = "z" * learner.recipe.text.max_tokens
    captions = ([""] * samples, ["a", *["bc"] * (samples - 1)], [longest] * samples)
    sizes = sizes or sizes_of(learner.recipe)
    own = (learner.recipe.data.height, learner.recipe.data.width)
    # The last sizes again, in another turn: each length then meets keys in eights and not in eights.
    for number, size in enumerate([*sizes, own, own, own, *sizes[-5:]]):
        loss = learner.backward(a_batch(size, captions[number % 3]), 0)[0]["loss"]
        assert torch.isfinite(loss)


def evaluate_with(learner: Learner) -> None:
    """Drawing and held-out losses with the averaged and the raw weights, of several pictures and of one."""
    recipe, world, modules = learner.recipe, learner.world, learner.modules
    for prompts in (["a"], ["", "ab", "z" * recipe.text.max_tokens]):
        with learner.averaged():
            drawn = evaluate.draw(modules, prompts, recipe, world)
        assert drawn.shape[0] == len(prompts)
        unguided = replace(recipe, sampling=replace(recipe.sampling, guidance=1.0))
        assert evaluate.draw(modules, prompts, unguided, world).shape == drawn.shape
    for size in sizes_of(recipe):
        for count in (1, 3):
            losses = evaluate.held_out_loss(modules, Pictures(size, count), recipe, world)
            assert all(np.isfinite(list(losses.values())))


def graphs_made() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", STATED)
def test_a_presets_blocks_have_the_stated_number_of_graphs_whatever_comes_by(name: str) -> None:
    recipe = small(name)
    learner = learner_of(recipe)
    train_on(learner, samples=2)
    evaluate_with(learner)
    assert graphs_made() == block_forms(recipe) == STATED[name]


@pytest.mark.parametrize(("name", "guidance", "graphs"), [("shapes", "self", 3), ("prx-512", "cfg", 8)])
def test_self_guidance_has_one_more(name: str, guidance: str, graphs: int) -> None:
    recipe = small(name, sampling=replace(small(name).sampling, guidance_kind=guidance))
    learner = learner_of(recipe)
    train_on(learner, samples=2)
    evaluate_with(learner)
    assert graphs_made() == block_forms(recipe) == graphs


def test_the_readme_states_these_numbers() -> None:
    """Of whole presets: `small` above keeps all that they depend on."""
    rows = dict(re.findall(r"^\| `([\w-]+)` \| [^|]*\| (\d+) \|$", README.read_text(), re.MULTILINE))
    assert {name: int(number) for name, number in rows.items()} == STATED
    for name, stated in STATED.items():
        recipe = PRESETS[name]()
        assert isinstance(recipe, Recipe)
        assert block_forms(recipe) == block_forms(small(name)) == stated


@pytest.mark.parametrize(("name", "samples"), [("prx-512", 1), ("shapes", 1), ("shapes", 3)])
def test_other_micro_batches_have_no_more(name: str, samples: int) -> None:
    learner = learner_of(small(name))
    train_on(learner, samples)
    evaluate_with(learner)
    # Alone, a dense sample and a routed one have rotary tables of one form.
    assert graphs_made() == (7 if (name, samples) == ("prx-512", 1) else STATED[name])


def test_a_second_stage_has_its_own() -> None:
    """In one process: Dynamo's count would otherwise go on where the first one's ended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*more graphs.*")
        for name in ("prx-512", "prx-1024"):
            recipe = small(name)
            train_on(learner_of(recipe), 2, sizes=sizes_of(recipe)[:3])
    assert graphs_made() > torch._dynamo.config.recompile_limit


def gradients(learner: Learner) -> dict[str, Tensor]:
    found = {}
    for name, parameter in learner.parameters:
        assert parameter.grad is not None
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        parameter.grad = None
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_past_the_limit_blocks_run_uncompiled_with_one_warning_and_the_same_numbers(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded (bf16 is, in one process too) and with activations recomputed; what has a graph keeps it."""
    monkeypatch.setattr(graphs, "BACKEND", "eager")  # the same operations: equal bit for bit
    preset = small("prx-512", parallel=Parallel(checkpointing=True), routing=Routing(start=1, end=1))
    recipe = replace(preset, train=replace(preset.train, precision=precision))
    plain = learner_of(replace(recipe, compile=Compile("no")))
    limited = learner_of(recipe)
    upright, own = sizes_of(recipe)[0], (recipe.data.height, recipe.data.width)
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, size in enumerate((own, upright, own)):
            batch = a_batch(size, ["a", "bcd"])
            losses = [learner.backward(batch, number)[0]["loss"] for learner in (plain, limited)]
            assert torch.equal(*losses)
            ours, theirs = gradients(limited), gradients(plain)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert learner_draws(plain, limited)
    said = [str(warning.message) for warning in caught if "more graphs" in str(warning.message)]
    assert len(said) == 1
    assert "a block has more graphs than the 9 foreseen, last in the form 'evaluation, dense" in said[0]
    assert graphs_made() == 2


def learner_draws(*learners: Learner) -> bool:
    """Whether they draw the same pictures."""
    first, second = (evaluate.draw(each.modules, ["a", "b"], each.recipe, each.world) for each in learners)
    return torch.equal(first, second)
