"""Teachers' networks have a graph for the preset's own size and one for other buckets, whatever samples come by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from prx_model import teachers as teachers_module
from prx_model.teacher_weights import load_timm
from tests.train.ranks.test_graphs import a_batch, sizes_of, small
from train.learner.teaching import TeacherLosses, build_teachers
from train.ranks import graphs
from train.ranks.graphs import compile_teachers
from train.recipes import LPIPS, PDINO, REPA, Recipe
from train.run.stopwatch import Stopwatch

CPU = torch.device("cpu")
SAMPLES = 3


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks of one block."""

    def shallow(*arguments: Any, **options: Any) -> Any:
        network: Any = load_timm(*arguments, **options)
        network.blocks = network.blocks[:1]
        return network

    monkeypatch.setattr(teachers_module, "load_timm", shallow)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def taught(**limits: float) -> Recipe:
    preset = small("prx-512")
    return small(
        "prx-512",
        # As in the recipe, whose sides are multiples of 32: VGG's four poolings halve even sides. With odd ones torch
        # 2.11 makes a graph for each place where a side is odd.
        model=replace(preset.model, patch_size=32),
        data=replace(preset.data, height=192, width=192),
        repa=REPA(enabled=True, teacher="vit_small_patch16_dinov3", weights="random", layer=1),
        lpips=LPIPS(enabled=True, weights="random", **limits),  # type: ignore[arg-type]
        pdino=PDINO(enabled=True, teacher="vit_small_patch14_reg4_dinov2", weights="random", size=28, **limits),
    )


def losses_of(recipe: Recipe, backend: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Tensor]]:
    """Each teacher's loss over a batch, its gradient taken; by compiled networks where there is a backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = build_teachers(recipe, CPU)
    if backend is not None:
        monkeypatch.setattr(graphs, "BACKEND", backend)
        compile_teachers(made, recipe, CPU)
    teaching = TeacherLosses(recipe, made)

    def losses(size: tuple[int, int], t: Tensor) -> dict[str, Tensor]:
        batch = a_batch(size, [""] * SAMPLES)
        patches = size[0] * size[1] // recipe.model.patch_size**2
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(SAMPLES, patches, recipe.model.patch_features, generator=generator).requires_grad_()
        features = torch.randn(SAMPLES, patches, recipe.model.hidden_size, generator=generator)
        total, parts = teaching(batch, tokens, features, None, t, Stopwatch(CPU))
        (gradient,) = torch.autograd.grad(total, tokens)
        assert torch.isfinite(gradient).all()
        return parts

    return losses


def test_every_bucket_and_every_number_of_samples_go_through_six_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = taught(t_max=0.5)
    losses = losses_of(recipe, "aot_eager", monkeypatch)
    for number, size in enumerate(sizes_of(recipe)):
        t = torch.linspace(0.1, 0.9, SAMPLES) - 0.4 * (number % 4) + 0.3
        losses(size, t)
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


def test_compiled_networks_say_what_eager_ones_say(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = taught()
    plain = losses_of(recipe, None, monkeypatch)
    compiled = losses_of(recipe, "aot_eager", monkeypatch)
    upright, own = sizes_of(recipe)[0], (recipe.data.height, recipe.data.width)
    for size in (upright, own, upright[::-1]):
        found, expected = (ask(size, torch.zeros(SAMPLES)) for ask in (compiled, plain))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_no_table_or_position_is_computed_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of timm's own, coordinates, their sines and their resampling are in every one."""
    seen: set[str] = set()

    def looked_at(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.update(str(getattr(node.target, "__name__", node.target)) for node in module.graph.nodes)
        return module.forward

    recipe = taught()
    losses = losses_of(recipe, looked_at, monkeypatch)
    for size in sizes_of(recipe)[:2]:
        losses(size, torch.zeros(SAMPLES))
    assert {"conv2d", "layer_norm"} <= seen, "the networks themselves"
    assert seen.isdisjoint({"arange", "meshgrid", "sin", "cos", "interpolate"})
