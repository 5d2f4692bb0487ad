"""Teachers in the trainer: parts that add up, samples that are skipped, projectors that resume, stages in sequence."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.roofline import vgg16_forward
from prx_kernels import unpatchify
from prx_model.teachers import Prediction
from train.checkpoint import checkpointer as checkpoint
from train.data.loader import Batch, batches, to_float
from train.errors import UserError
from train.learner.teaching import build_teachers
from train.loop import Outcome, Trainer
from train.ranks import parallel
from train.recipes import LPIPS, PDINO, REPA, Checkpoint, Output, Recipe, Routing, shapes
from train.run.stages import carry_over, finished

REPA_SMALL = REPA(enabled=True, teacher="vit_small_patch16_dinov3", weights="random", layer=1)
LPIPS_SMALL = LPIPS(enabled=True, weights="random")
PDINO_SMALL = PDINO(enabled=True, teacher="vit_small_patch14_reg4_dinov2", weights="random", size=28)


def tiny(folder: Path, *, steps: int = 4, name: str = "run", **sections: object) -> Recipe:
    preset = shapes()
    model = replace(
        preset.model, hidden_size=32, num_heads=1, axes_dim=(16, 16), depth=3, context_in_dim=32, bottleneck_size=16
    )
    recipe = replace(
        preset,
        model=model,
        routing=Routing(enabled=True, start=1, end=1),
        train=replace(preset.train, steps=steps, batch=4, warmup=0, cooldown=0, device="cpu"),
        sampling=replace(preset.sampling, steps=2),
        evaluation=replace(preset.evaluation, prompts=4, grid=2, every=100),
        checkpoint=Checkpoint(every=2),
        output=Output(folder=str(folder), name=name),
    )
    return replace(recipe, **sections)  # type: ignore[arg-type]


def run(recipe: Recipe, **arguments: object) -> tuple[Trainer, Outcome]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(recipe, parallel.start(recipe.train), **arguments)  # type: ignore[arg-type]
    return trainer, trainer.run()


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with every ingredient on."""
    folder = tmp_path_factory.mktemp("taught")
    _, outcome = run(tiny(folder, repa=REPA_SMALL, lpips=LPIPS_SMALL, pdino=PDINO_SMALL))
    assert outcome.finished
    return outcome.folder


def test_the_logged_parts_add_up_to_the_loss_and_each_teacher_has_its_time_and_flop(taught: Path) -> None:
    lines = logged(taught)
    values = next(line for line in lines if "train/loss" in line)
    parts = {name: values[f"train/loss/{name}"] for name in ("flow", "repa", "lpips", "pdino")}
    total = parts["flow"] + 0.5 * parts["repa"] + 0.1 * parts["lpips"] + 0.01 * parts["pdino"]
    assert values["train/loss"] == pytest.approx(total, rel=1e-5)
    assert -1 <= parts["repa"] <= 1
    assert parts["lpips"] > 0
    assert 0 < parts["pdino"] <= 2
    assert all(values[f"time/{name}_ms"] > 0 for name in ("repa", "lpips", "pdino", "denoiser", "backward"))
    flop = next(line for line in lines if "flop/repa_per_image" in line)
    assert flop["flop/lpips_per_image"] == pytest.approx(3 * vgg16_forward(16, 16), rel=0.01)
    assert flop["flop/repa_per_image"] > 1e8
    assert flop["flop/pdino_per_image"] > 1e8


def test_only_the_projector_of_the_teachers_is_saved_and_none_is_averaged(taught: Path) -> None:
    folder = checkpoint.complete(taught)[-1]
    tensors = checkpoint.load(folder).tensors
    assert tensors.keys() == {"model", "tower", "repa", "ema", "optimizer"}
    assert {name.split(".")[0] for name in tensors["repa"]} == {"projector"}
    assert not any(name.startswith("repa") for name in tensors["ema"])
    assert any(name.startswith("repa.projector") for name in tensors["optimizer"])


def test_a_taught_run_goes_on_bitwise(tmp_path: Path) -> None:
    """2 steps and 2 more equal 4, with the same frozen networks: random ones come from torch's own generator."""
    networks: dict[str, list[object]] = {}

    def trained(name: str, steps: int) -> Path:
        recipe = tiny(tmp_path, name=name, steps=steps, repa=REPA_SMALL, lpips=LPIPS_SMALL, pdino=PDINO_SMALL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(recipe, parallel.start(recipe.train))
        for key, teacher in trainer.learner.teaching.teachers.items():
            teacher._frozen = networks.setdefault(key, teacher._frozen)
        return checkpoint.complete(trainer.run().folder)[-1]

    trained("parts", 2)
    parts, whole = trained("parts", 4), trained("whole", 4)
    for name in ("model", "repa", "ema", "optimizer"):
        a, b = (checkpoint.load(folder).tensors[name] for folder in (parts, whole))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_samples_above_t_max_do_not_go_through_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = tiny(tmp_path, lpips=replace(LPIPS_SMALL, t_max=0.6), flow=replace(shapes().flow, shift=1.0))
    world = parallel.start(limited.train)
    trainer = Trainer(limited, world)
    teacher = trainer.learner.teaching.teachers["lpips"]
    sizes = []
    forward = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda seen: sizes.append(len(seen.image)) or forward(seen))
    expected = []
    for number, batch in enumerate(list(batches(trainer.dataset, limited, world, 0))[:3]):
        t = trainer.learner._sample_t(batch.positions, trainer.learner._seed("t", number))
        expected.append(int((t < 0.6).sum()))
        assert torch.isfinite(trainer.learner.step(batch, number).parts["loss"])
    assert sizes == [count for count in expected if count]
    assert any(0 < count < 4 for count in expected), "the limit must cut somewhere for this test to say anything"


def test_a_loss_of_some_samples_is_the_mean_of_those_of_its_halves(tmp_path: Path) -> None:
    """As two ranks see them, whose shares below t_max differ: the mean over ranks is that of one rank alone."""
    limited = tiny(tmp_path, lpips=replace(LPIPS_SMALL, t_max=0.6))
    trainer = Trainer(limited, parallel.start(limited.train))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randn(4, 16, 192, generator=generator)
    t = torch.tensor([0.1, 0.2, 0.3, 0.9])

    def loss(chosen: slice) -> float:
        batch = Batch(image[chosen], [""] * 4, torch.arange(4)[chosen], torch.arange(4)[chosen])
        total, parts = trainer.learner.teaching(batch, tokens[chosen], None, None, t[chosen], trainer.learner.stopwatch)
        assert float(total) == pytest.approx(0.1 * float(parts["lpips"]), rel=1e-6)
        return float(parts["lpips"])

    halves = [loss(slice(0, 2)), loss(slice(2, 4))]
    assert loss(slice(0, 4)) == pytest.approx(sum(halves) / 2, rel=1e-5)
    assert halves[1] < 0.75 * halves[0], "the second half has one sample below t_max"


@pytest.mark.parametrize("t_max", [0.6, 1.0])
def test_the_published_mean_is_over_the_samples_below_t_max(tmp_path: Path, t_max: float) -> None:
    """PRX's formula: the sum over samples with t < t_max over their count, at least 1; gradients too."""
    lpips, pdino = (replace(section, t_max=t_max, t_mean="below") for section in (LPIPS_SMALL, PDINO_SMALL))
    trainer = Trainer(tiny(tmp_path, lpips=lpips, pdino=pdino), parallel.start(shapes().train))
    teaching, generator = trainer.learner.teaching, torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randn(4, 16, 192, generator=generator).requires_grad_()
    t = torch.tensor([0.1, 0.9, 0.3, 0.6])
    batch = Batch(image, [""] * 4, torch.arange(4), torch.arange(4))
    host_t = t if teaching.needs_host_t else None
    total, parts = teaching(batch, tokens, None, None, host_t, trainer.learner.stopwatch)
    (got,) = torch.autograd.grad(total, tokens)

    mask = (t < t_max).float()
    seen = Prediction(to_float(image), unpatchify(tokens, 8, 32, 32))
    expected = torch.zeros(())
    for name, weight in (("lpips", 0.1), ("pdino", 0.01)):
        value = (teaching.teachers[name](seen) * mask).sum() / mask.sum().clamp(min=1)
        assert float(parts[name]) == pytest.approx(float(value.detach()), rel=1e-5)
        expected = expected + weight * value
    (gradient,) = torch.autograd.grad(expected, tokens)
    torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_weight_of_zero_builds_and_runs_nothing(tmp_path: Path) -> None:
    none = {"lpips": replace(LPIPS_SMALL, weight=0.0), "pdino": replace(PDINO_SMALL, weight=0.0)}
    assert build_teachers(tiny(tmp_path, repa=replace(REPA_SMALL, weight=0.0), **none), torch.device("cpu")) == {}


def test_no_sample_below_t_max_is_a_loss_of_zero_with_gradients(tmp_path: Path) -> None:
    limited = tiny(tmp_path, lpips=replace(LPIPS_SMALL, t_max=1e-6))
    trainer, _ = run(limited)
    values = next(line for line in logged(trainer.folder) if "train/loss" in line)
    assert values["train/loss/lpips"] == 0.0
    assert values["train/loss"] == pytest.approx(values["train/loss/flow"], rel=1e-6)


@pytest.mark.parametrize("layer", [0, 2])
def test_repa_outside_the_route_sees_all_tokens(tmp_path: Path, layer: int) -> None:
    """Its loss then exists and is finite: with kept tokens only, the shapes would not fit."""
    trainer, outcome = run(tiny(tmp_path, steps=1, repa=replace(REPA_SMALL, layer=layer)))
    assert outcome.finished


def test_settings_that_do_not_fit_are_sentences(tmp_path: Path) -> None:
    for section, message in (
        ({"repa": replace(REPA_SMALL, layer=3)}, "repa.layer 3 must be a block of the model, 0 to 2"),
        ({"repa": replace(REPA_SMALL, projector_layers=0)}, "repa.projector_layers must be at least 1"),
        ({"repa": replace(REPA_SMALL, weights=str(tmp_path / "no.pth"))}, "there is no file"),
        ({"pdino": replace(PDINO_SMALL, size=30)}, "pdino.size 30 must be a multiple of the patch 14"),
        ({"lpips": replace(LPIPS_SMALL, network="alex")}, "lpips.network 'alex' needs pictures of at least 62 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(tiny(tmp_path, **section), parallel.start(shapes().train))
    assert list(tmp_path.iterdir()) == []


def test_projector_starts_alike_for_a_seed_and_nothing_is_built_unasked(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, repa=REPA_SMALL)
    first, second = (build_teachers(recipe, torch.device("cpu"))["repa"].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert build_teachers(tiny(tmp_path), torch.device("cpu")) == {}


# --- stages ----------------------------------------------------------------------------------------------------------


def test_the_second_stage_goes_on_without_repa_and_behind_the_firsts_samples(taught: Path, tmp_path: Path) -> None:
    second = tiny(tmp_path, name="second", lpips=LPIPS_SMALL, pdino=PDINO_SMALL)
    second = replace(second, data=replace(second.data, height=48, width=48))
    trainer = Trainer(second, parallel.start(second.train), stage=1, previous=taught)
    before = checkpoint.load(checkpoint.complete(taught)[-1]).tensors
    model, ema, state = before["model"], before["ema"], before["optimizer"]
    assert all(torch.equal(value, model[key]) for key, value in trainer.learner.modules.model.state_dict().items())
    assert all(torch.equal(value, ema[key]) for key, value in trainer.learner.ema.state_dict().items())
    kept = {key: value for key, value in state.items() if not key.startswith("repa.")}
    assert trainer.learner.optimizers.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in trainer.learner.optimizers.state_dict().items())
    assert trainer.first_position == 4 * 4
    outcome = trainer.run()
    saved = checkpoint.load(checkpoint.complete(outcome.folder)[-1])
    assert (saved.state["first_position"], saved.state["position"]) == (16, 32)
    resumed = Trainer(second, parallel.start(second.train), stage=1, previous=taught)
    assert (resumed.step, resumed.first_position) == (4, 16)
    assert finished(second)


def test_anything_else_that_does_not_fit_is_refused(taught: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no whole checkpoint to start the next stage from"):
        Trainer(tiny(tmp_path), parallel.start(shapes().train), stage=1, previous=tmp_path / "nothing")
    wider = tiny(tmp_path)
    wider = replace(wider, model=replace(wider.model, bottleneck_size=32))
    with pytest.raises(UserError, match="does not fit this stage"):
        Trainer(wider, parallel.start(wider.train), stage=1, previous=taught)
    saved = checkpoint.load(checkpoint.complete(taught)[-1])
    assert "repa" in saved.tensors
    trainer = Trainer(tiny(tmp_path, name="other"), parallel.start(shapes().train))
    model = dict(trainer.learner.modules.model.state_dict())
    ema, optimizer = trainer.learner.ema.state_dict(), trainer.learner.optimizers.state_dict()
    with pytest.raises(UserError, match="its section 'tower' has no place here"):
        carry_over(taught, {"model": model, "ema": ema, "optimizer": optimizer})
