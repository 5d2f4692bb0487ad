"""The one answer to hours and dollars: what it stands on, and how it is scaled."""

from dataclasses import replace
from pathlib import Path

import pytest

from prx_model.flops import training_flop
from train.commandline import DryRun, parse
from train.recipes import REPA, Parallel, Recipe, Train, prx_512, prx_1024, shapes
from train.run import hours
from train.run.plan import project


def counted(recipe: Recipe, **assumed: float) -> float | None:
    """Seconds of the counted step, None where there is none."""
    step = hours.counted_step(recipe, DryRun(**assumed))  # type: ignore[arg-type]
    return None if step is None else sum(step.parts.values())


def test_the_preset_s_step_is_the_counted_one() -> None:
    for recipe in (prx_512(), prx_1024()):
        budget = hours.budget(recipe.preset, 32)
        assert counted(recipe) == budget["expected ms"] / 1e3
        assert budget["pictures"] == recipe.train.batch / 32
    alone = replace(prx_512(), train=replace(prx_512().train, batch=32))
    assert counted(alone, gpus=1) == hours.budget("prx-512", 1)["expected ms"] / 1e3


def test_other_numbers_of_gpus_take_the_same_time_a_picture_and_say_so() -> None:
    one, rank = (hours.budget("prx-512", ranks)["expected ms"] for ranks in (1, 32))
    optimizer = (one - rank) * 32 / 31
    assert counted(prx_512(), gpus=8) == pytest.approx((4 * (one - optimizer) + optimizer / 8) / 1e3)
    assert "scaled to 128 pictures a GPU" in project(prx_512(), DryRun(gpus=8)).expected.line()


@pytest.mark.parametrize(
    "change",
    [
        {"repa": REPA(enabled=False)},
        {"parallel": Parallel(checkpointing=True)},
        {"train": Train(precision="fp32")},
        {"data": replace(prx_512().data, height=256)},
    ],
)
def test_another_step_than_the_preset_s_is_not_the_counted_one(change: dict[str, object]) -> None:
    assert counted(replace(prx_512(), **change)) is None  # type: ignore[arg-type]


def test_what_changes_no_step_leaves_the_count() -> None:
    changed = replace(prx_512(), train=replace(prx_512().train, steps=7, seed=3), parallel=Parallel(shard=32))
    assert counted(changed) == counted(prx_512())


def test_an_mfu_or_another_gpu_takes_the_place_of_the_count() -> None:
    assert counted(prx_512(), mfu=0.4) is counted(prx_512(), peak_tflops=312.0) is None
    line = project(prx_512(), DryRun(mfu=0.25)).expected.line()
    assert "an assumed MFU of 25%" in line
    assert "the published run's was 4.2%" in line
    assert counted(shapes()) is None


def test_the_assumed_mfu_is_the_denoiser_s_operations_over_everything() -> None:
    recipe, gpus = prx_512(), 32
    work = 1024 * training_flop(recipe.model, 256, 256, recipe.routing)
    found = project(recipe, DryRun(gpus=gpus, mfu=0.5)).expected
    assert found.hours == pytest.approx(100_000 * work / (gpus * 989e12 * 0.5) / 3600)
    assert found.dollars == pytest.approx(found.hours * 64)
    assert hours.published_mfu() == pytest.approx(0.042, abs=5e-4)


def test_without_a_count_the_assumption_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "BUDGETS", tmp_path)
    assert counted(prx_512()) is None
    assert "assumed MFU" in project(prx_512(), DryRun()).expected.line()


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (4, 1), (8, 1), (12, 2), (32, 4), (31, 31)])
def test_gpus_stand_on_nodes_of_at_most_eight(gpus: int, nodes: int) -> None:
    network = hours.network_of(gpus)
    assert (network.nodes, network.ranks) == (nodes, gpus)


def test_shards_that_cut_across_nodes_have_an_answer() -> None:
    assert project(replace(prx_512(), parallel=Parallel(shard=12)), DryRun(gpus=24)).expected.hours > 0


def test_toys_are_projected_for_one_gpu_and_the_recipe_for_those_of_the_published_run() -> None:
    assert [parse([name, "--dry-run"]).dry_run.gpus for name in ("shapes", "pictograms", "prx-512")] == [1, 1, 32]
    assert parse(["shapes", "--dry-run", "--gpus", "4"]).dry_run.gpus == 4
