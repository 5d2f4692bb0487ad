"""The `prx-*` presets equal docs/recipe.md field by field; numbers here are copied from it, not from the code."""

from dataclasses import asdict, replace

import pytest

from prx_model.config import PRXConfig
from train.errors import UserError
from train.evaluation.evaluate import guidance_notes
from train.learner.build import check
from train.recipes import PRESETS, Recipe, TwoStages, for_device, prx_24h, prx_512, prx_1024, shapes

STAGE_1 = {
    "data.height": 512,
    "data.width": 512,
    "data.buckets": True,
    "data.fit": "stretch",
    "train.steps": 100_000,
    "train.batch": 1024,
    "repa.enabled": True,
    "model.in_channels": 3,
    "model.patch_size": 32,
    "model.bottleneck_size": 256,
    "model.hidden_size": 1792,
    "model.depth": 16,
    "model.num_heads": 28,
    "model.mlp_ratio": 3.5,
    "model.context_in_dim": 2304,
    "model.axes_dim": (32, 32),
    "model.theta": 10_000,
    "text.kind": "t5gemma",
    "text.name": "google/t5gemma-2b-2b-ul2",
    "text.max_tokens": 256,
    "flow.shift": 3.0,
    "flow.uniform_fraction": 0.1,
    "flow.t_floor": 1e-3,
    "flow.t_min": 0.05,
    "flow.noise_scale": 1.0,
    "flow.caption_drop": 0.1,
    "sampling.guidance": 3.5,
    "sampling.guidance_kind": "self",
    "sampling.steps": 50,
    "sampling.time_grid": "linear",
    "sampling.routed_tokens": "once",
    "sampling.t_min": 0.05,
    "sampling.shift": 3.0,
    "lpips.enabled": True,
    "lpips.weight": 0.1,
    "lpips.network": "vgg",
    "lpips.t_max": 1.0,
    "lpips.t_mean": "below",
    "pdino.enabled": True,
    "pdino.weight": 0.01,
    "pdino.teacher": "vit_base_patch14_reg4_dinov2",
    "pdino.size": 224,
    "pdino.t_max": 1.0,
    "pdino.t_mean": "below",
    "pdino.order": "resize-first",
    "routing.enabled": True,
    "routing.start": 1,
    "routing.end": 14,
    "routing.selection_ratio": 0.5,
    "repa.weight": 0.5,
    "repa.layer": 7,
    "repa.projector_layers": 3,
    "repa.teacher": "vit_large_patch16_dinov3",
    "muon.enabled": True,
    "muon.lr": 1e-4,
    "muon.momentum": 0.95,
    "muon.nesterov": True,
    "muon.ns_steps": 5,
    "muon.ns_coefficients": (3.4445, -4.7750, 2.0315),
    "muon.ns_preconditioner": None,
    "muon.weight_decay": 0.0,
    "adam.lr": 1e-4,
    "adam.betas": (0.9, 0.95),
    "adam.eps": 1e-8,
    "adam.weight_decay": 0.0,
    "train.warmup": 1_000,
    "train.cooldown": 0,
    "train.clip": 0.2,
    "train.init": "torch",
    "ema.decay": 0.999,
    "ema.every": 10,
    "ema.phase": "last",
    "evaluation.protocol": "prx",
}
STAGE_2 = STAGE_1 | {
    "data.height": 1024,
    "data.width": 1024,
    "train.steps": 20_000,
    "train.batch": 512,
    "repa.enabled": False,
    "train.warmup": 0,
}


def field(recipe: Recipe, name: str) -> object:
    section, leaf = name.split(".")
    return getattr(getattr(recipe, section), leaf)


@pytest.mark.parametrize(("recipe", "expected"), [(prx_512(), STAGE_1), (prx_1024(), STAGE_2)], ids=["512", "1024"])
def test_prx_presets_equal_the_recipe(recipe: Recipe, expected: dict[str, object]) -> None:
    found = {name: field(recipe, name) for name in expected}
    assert found == expected
    assert 28 <= recipe.sampling.steps <= 50


def test_the_two_stages_are_the_presets() -> None:
    whole = prx_24h()
    assert isinstance(whole, TwoStages)
    for stage, preset in ((whole.stage1, prx_512()), (whole.stage2, prx_1024())):
        assert replace(stage, output=preset.output) == preset
    assert (whole.stage1.output.name, whole.stage2.output.name) == ("prx-24h/stage-1", "prx-24h/stage-2")


def test_tokens_of_the_stages() -> None:
    assert prx_512().model.tokens(512, 512) == 256
    assert prx_1024().model.tokens(1024, 1024) == 1024


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_itself(name: str) -> None:
    recipe = PRESETS[name]()
    for stage in (recipe.stage1, recipe.stage2) if isinstance(recipe, TwoStages) else (recipe,):
        check(stage)


def test_pictograms_grow_on_a_gpu_unless_their_size_was_set() -> None:
    recipe = PRESETS["pictograms"]()
    assert isinstance(recipe, Recipe)
    assert for_device(recipe, "cpu") == recipe
    grown = for_device(recipe, "cuda")
    assert (grown.data.height, grown.data.width, grown.data.image_column) == (128, 128, "image")
    own = replace(recipe, data=replace(recipe.data, height=96))
    assert for_device(own, "cuda") == own
    assert for_device(shapes(), "cuda") == shapes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"steps": 0}}, "train.steps must be at least 1"),
        ({"train": {"clip": 0.0}}, "train.clip must be positive"),
        ({"data": {"bad_limit": 1.5}}, "data.bad_limit is a share from 0 to 1, got 1.5"),
        ({"data": {"tries": 0}}, "data.tries must be at least 1"),
        ({"data": {"height": 20}}, "not a multiple of the patch size 8"),
        ({"routing": {"enabled": True, "end": 4}}, "the model has blocks 0 to 3"),
        ({"text": {"num_heads": 3}}, "text.num_heads 3 must divide"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, dict[str, object]], message: str) -> None:
    recipe = shapes()
    for section, values in change.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **values)})
    with pytest.raises(UserError, match=message):
        check(recipe)


def test_config_fields_are_those_of_diffusers() -> None:
    known = {
        "in_channels", "patch_size", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads", "depth", "axes_dim",
        "theta", "bottleneck_size",
    }  # fmt: skip
    assert set(asdict(PRXConfig())) == known


def test_self_guidance_without_routing_has_a_note() -> None:
    recipe = prx_512()
    assert guidance_notes(recipe) == []
    dense = replace(recipe, routing=replace(recipe.routing, enabled=False))
    (note,) = guidance_notes(dense)
    assert "trained without routing" in note
    assert "--sampling.guidance-kind cfg" in note
    assert guidance_notes(replace(dense, sampling=replace(dense.sampling, guidance_kind="cfg"))) == []
