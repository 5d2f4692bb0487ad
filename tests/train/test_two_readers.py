"""Two readers of one fact: what is projected before a run is what the trainer does."""

from pathlib import Path

import pytest

from tests.train.commands import TINY, run_program
from train.checkpoint import files
from train.commandline import DryRun, parse
from train.errors import UserError
from train.learner.build import check_ranks
from train.loop import Trainer
from train.ranks import parallel
from train.ranks.parallel import mesh_shape
from train.recipes import Parallel, Recipe, prx_512
from train.run.plan import project

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_the_projected_size_of_a_checkpoint_is_the_size_of_one(tmp_path: Path) -> None:
    words = ["--train.steps", "1", "--train.device", "cpu", "--output.folder", str(tmp_path)]
    recipe = parse(["shapes", *TINY, *words]).recipe
    assert isinstance(recipe, Recipe)
    run = Trainer(recipe, parallel.start(recipe.train)).run().folder
    written = sum(file.stat().st_size for file in files.step_folder(run, 1).glob("*.safetensors"))
    projected = project(recipe, DryRun()).checkpoint_bytes
    assert projected == pytest.approx(written, rel=0.15)  # headers, and AdamW's step of each tensor
    assert projected < written


@pytest.mark.parametrize(
    ("settings", "gpus", "shards"),
    [
        (Parallel(), 32, 8),
        (Parallel(), 8, 8),
        (Parallel(), 4, 4),
        (Parallel(shard=32), 32, 32),
        (Parallel(shard=1), 8, 1),
    ],
)
def test_memory_is_projected_for_the_layout_that_the_trainer_takes(settings: Parallel, gpus: int, shards: int) -> None:
    """Doctor divided by all GPUs, where copies are kept on every node."""
    from dataclasses import replace

    cost = project(replace(prx_512(), parallel=settings), DryRun(gpus=gpus))
    assert cost.shards == shards == mesh_shape(settings, gpus, min(gpus, 8))[1]


def test_a_mesh_that_the_trainer_refuses_is_refused_by_the_dry_run_too() -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="must be the number of ranks, which is 32"):
        project(replace(prx_512(), parallel=Parallel(replicate=3, shard=5)), DryRun(gpus=32))


def test_a_batch_that_the_trainer_refuses_is_told_by_dry_run_and_doctor() -> None:
    recipe = parse(["shapes", "--train.batch", "40"]).recipe
    assert isinstance(recipe, Recipe)
    with pytest.raises(UserError, match="train.batch 40 must be a multiple of the 32 ranks") as refused:
        check_ranks(recipe, 32)
    for program in ("speedrun", "doctor"):
        done = run_program(program, "shapes", "--train.batch", "40", "--dry-run", "--gpus", "32")
        assert str(refused.value) in done.stdout
