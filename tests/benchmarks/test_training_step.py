"""The baseline is what it says, every way of a step is the same mathematics, and a wrong one gets no figure."""

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import denoisers, test_step
from benchmarks.plain_prx import HookRouting, PlainEMA, PlainPRX, velocity_loss
from benchmarks.profile_step import lines
from benchmarks.sizes import Case, routing, text_lengths
from benchmarks.trainer_step import TrainerStep
from benchmarks.training_step import LADDER, WHOLE, TrainingStep, Way, make_inputs
from prx_kernels import reference
from prx_kernels.muon.owners import local
from train.ranks.working_copy import WorkingCopy

CASE = Case(64, 2, text=8)
NO_TEACHERS = Way("ours, without teachers", "ours", routed=True, packed=True, optimizer="muon", ema=True)


def test_rungs_of_the_ladder_differ_by_one_ingredient_and_end_with_the_whole_step() -> None:
    for below, above in zip(LADDER, LADDER[1:], strict=False):
        changed = [f.name for f in fields(Way) if getattr(below, f.name) != getattr(above, f.name)]
        assert len(changed) == 2, (above.name, changed)
        assert changed[0] == "name"
    assert replace(LADDER[-1], name="ours") == WHOLE[0]
    assert Way("ours", "ours", True, True, True, True, "muon", True) == WHOLE[0]
    assert {replace(way, name="", denoiser="plain", compiled=True, packed=False, trainer=False) for way in WHOLE} == {
        Way("", compiled=True, routed=True, teachers=True, optimizer="muon", ema=True)
    }


def test_the_plain_definition_computes_what_diffusers_computes() -> None:
    inputs = make_inputs(CASE)
    image, t = torch.randn(inputs.image.shape), torch.tensor([0.2, 0.9])
    kinds: tuple[denoisers.Kind, ...] = ("plain", "diffusers", "ours")
    with torch.no_grad():
        plain, theirs, ours = (
            denoisers.predict(kind, denoisers.build(kind, CASE.config), image, t, inputs.text, inputs.mask)
            for kind in kinds
        )
    assert float(plain.abs().mean()) > 0.1
    assert torch.allclose(plain, theirs, atol=2e-5)
    assert torch.allclose(plain, ours, atol=2e-5)


def test_the_mask_of_the_baseline_is_a_number_for_every_head_query_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(attn_mask.shape), attn_mask.is_contiguous(), attn_mask.dtype))
        return attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    inputs = make_inputs(CASE)
    PlainPRX(CASE.config)(torch.randn(inputs.image.shape), torch.rand(2), inputs.text, inputs.mask)
    assert set(seen) == {((2, 2, 4, 8 + 4), True, torch.float32)}


def test_hooks_route_the_kept_tokens_and_hand_the_others_round() -> None:
    blocks = torch.nn.ModuleList(Doubling() for _ in range(3))
    route = HookRouting(blocks, routing(CASE.config))
    x, rotary = torch.randn(2, 8, 4), torch.arange(8.0).expand(2, 1, 8).unsqueeze(-1)
    route.scores = torch.rand(2, 8)
    out = x
    for block in blocks:
        out = block(out, rotary=rotary)
    assert route.keep is not None
    assert torch.equal(route.keep, route.scores.topk(4, dim=1).indices.sort(dim=1).values)
    routed = reference.scatter_tokens(2 * x, 4 * reference.gather_tokens(x, route.keep), route.keep)
    assert torch.equal(out, 2 * routed)
    assert torch.equal(blocks[1].seen[:, 0, :, 0], route.keep.float())
    assert torch.equal(blocks[2].seen, rotary)


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, rotary: torch.Tensor) -> torch.Tensor:
        self.seen = rotary
        return 2 * x


def test_velocity_loss_is_the_x_prediction_loss_without_noise() -> None:
    x0, x0_hat, x_t = (torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.01, 0.5, 1.0])
    tokens = reference.patchify(x0_hat, 4)
    assert torch.allclose(
        velocity_loss(x0_hat, x0, x_t, t), reference.x_prediction_loss(tokens, x0, t, 4).mean(), rtol=1e-6
    )


def test_the_plain_average_moves_at_its_steps_only() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = PlainEMA([weight], 0.9, 10)
    with torch.no_grad():
        weight.fill_(1.0)
    for step in range(1, 10):
        ema.update(step)
    assert float(ema.averages[0].max()) == 0.0
    ema.update(10)
    assert torch.allclose(ema.averages[0], torch.full((3,), 0.1))


def test_our_step_has_the_truth_s_gradients_and_updates_and_a_wrong_route_has_not() -> None:
    step = TrainingStep(NO_TEACHERS, CASE)
    assert test_step.check(step) < 1e-5
    wrong = TrainingStep(NO_TEACHERS, CASE)
    wrong.recipe = replace(wrong.recipe, routing=replace(wrong.recipe.routing, end=0, start=0))
    assert test_step.error_of_gradients(wrong) > 1e-2


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_the_trainer_s_step_has_the_truth_s_gradients_and_updates(precision: str, tolerance: float) -> None:
    step = TrainerStep(next(way for way in WHOLE if way.trainer), CASE, precision=precision)
    try:
        assert test_step.check(step) < tolerance
        before = [average.clone() for average in step.averages]
        assert float(step()) > 0
        assert all(torch.equal(local(a), local(b)) for a, b in zip(before, step.averages, strict=True)), "not its turn"

        def forgets(factor: float, clip: float, copies: Sequence[WorkingCopy] = ()) -> torch.Tensor:
            step.learner.optimizers.optimizer.zero_grad()
            return torch.ones(())

        step.learner.optimizers.step = forgets
        step.count = step.recipe.ema.every
        with pytest.raises(AssertionError, match="update is off"):
            test_step.check(step)
    finally:
        step.close()


def test_a_way_that_forgets_to_average_or_scales_its_update_is_refused() -> None:
    lazy = TrainingStep(NO_TEACHERS, CASE)
    lazy._average = lambda step: None
    test_step.error_of_gradients(lazy)
    with pytest.raises(AssertionError):
        test_step.error_of_update(lazy)
    fast = TrainingStep(replace(NO_TEACHERS, ema=False), CASE)
    optimize = fast._optimize

    def twice() -> None:
        gradients = [p.grad.clone() for p in fast.parameters if p.grad is not None]
        optimize()
        for parameter, gradient in zip(fast.parameters, gradients, strict=True):
            parameter.grad = gradient
        optimize()

    fast._optimize = twice
    test_step.error_of_gradients(fast)
    by_muon, by_adam = test_step.error_of_update(fast)
    assert by_muon > 0.1
    assert by_adam > 0.5


def test_a_missing_checkout_of_the_repository_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("PRX_REFERENCE", raising=False)
    assert "PRX_REFERENCE is not set" in str(denoisers.missing("PRX repository"))
    monkeypatch.setenv("PRX_REFERENCE", str(tmp_path))
    assert "is no checkout of the PRX repository" in str(denoisers.missing("PRX repository"))
    assert denoisers.missing("plain") is None


def test_rows_are_all_there_and_begin_with_what_is_compared_at_both_sizes() -> None:
    stages = [Case(size, 1, fill=fill) for fill in (0.4, 1.0) for size in (512, 1024)]
    made = test_step.rows(stages)
    assert len(made) == len(set(made)) == 4 * (len(WHOLE) + 2 + len(LADDER) - 1)
    first = [(op.split(", ")[1], case.size, case.fill, way.name) for op, case, way in made[:8]]
    assert first == [
        (op, size, 0.4, name)
        for size in (512, 1024)
        for op in ("all ingredients", "without optimizer")
        for name in ("ours", "PRX way, compiled")
    ]


def test_captions_fill_their_share_and_none_is_empty() -> None:
    lengths = text_lengths(32, 256, 0.4)
    assert sum(lengths) / 32 == pytest.approx(0.4 * 256, abs=0.5)
    assert (min(lengths), max(lengths)) == (1, 204)
    assert text_lengths(3, 256, 1.0) == [256] * 3


def test_a_profile_s_table_shows_shares_of_the_step_and_its_gaps() -> None:
    kernels = [{"kernel": f"kernel {i}", "us": 1e3 * (30 - i), "launches": 1.0} for i in range(30)]
    result = {
        "way": "ours", "case": "512 px x 32", "ms": 100.0, "gap_ms": 10.0, "kernels": kernels,
        "kinds_us": {"matrix": 70e3, "other memory-bound": 20e3},
    }  # fmt: skip
    table = lines(result)
    assert table[0] == "ours, 512 px x 32: 100.00 ms"
    assert [line.split()[-1] for line in table[1:4]] == ["70.0%", "20.0%", "10.0%"]
    assert sum("kernel " in line for line in table[4:]) == 20
