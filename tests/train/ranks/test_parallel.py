"""FSDP2, HSDP, DDP and one process train the same model: weights, losses, averages, with everything on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.ranks import training as ranks
from train.data.loader import batches, open_dataset
from train.errors import UserError
from train.learner.step import Learner
from train.ranks import parallel
from train.ranks.parallel import mesh_shape
from train.recipes import Parallel

ON_TWO = {
    "FSDP2": {"shard": 2},
    "DDP": {"replicate": 2},
    "accumulation, checkpointing, resharding": {
        "shard": 2,
        "micro_batches": 2,
        "checkpointing": True,
        "reshard_after_forward": True,
    },
}
ON_FOUR = {"HSDP, 2 x 2": {"replicate": 2, "shard": 2}}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return ranks.train(Parallel())


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each layout trained."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ranks.__file__, str(folder), json.dumps({"2": ON_TWO, "4": ON_FOUR})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return {name: load_file(folder / name) for name in ON_TWO | ON_FOUR}


@pytest.mark.parametrize("layout", ON_TWO | ON_FOUR)
def test_ranks_train_what_one_process_trains(
    alone: dict[str, Tensor], together: dict[str, dict[str, Tensor]], layout: str
) -> None:
    found = together[layout]
    assert found.keys() == alone.keys()
    for name in found:
        if name.startswith("initial/"):
            assert torch.equal(found[name], alone[name]), f"{name} starts with other weights"
    # Sums of eight samples in another order, in float32; ten steps of Muon carry that on.
    torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
    for name in found:
        difference = float((found[name] - alone[name]).norm() / alone[name].norm().clamp(min=1e-6))
        assert difference < 1e-3, f"{name} differs by {difference:.1e}"


def test_something_was_clipped_and_learnt(alone: dict[str, Tensor]) -> None:
    """So that the comparison above is of a run in which clipping and updates matter."""
    assert (alone["norms"] > 0.05).all()
    assert not torch.equal(alone["model/final_layer.linear.weight"], alone["initial/model/final_layer.linear.weight"])
    assert not torch.equal(alone["ema/model.final_layer.linear.weight"], alone["model/final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("settings", "size", "per_node", "shape"),
    [
        (Parallel(), 1, 1, (1, 1)),
        (Parallel(), 8, 8, (1, 8)),
        (Parallel(), 32, 8, (4, 8)),
        (Parallel(shard=32), 32, 8, (1, 32)),
        (Parallel(shard=1), 8, 8, (8, 1)),
        (Parallel(replicate=2), 8, 8, (2, 4)),
        (Parallel(replicate=2, shard=4), 8, 2, (2, 4)),
    ],
)
def test_weights_are_split_inside_a_node_and_repeated_across(settings, size, per_node, shape) -> None:
    assert mesh_shape(settings, size, per_node) == shape


def test_a_mesh_that_does_not_hold_the_ranks_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.replicate 3 x parallel.shard 2 must be the number of ranks"):
        mesh_shape(Parallel(replicate=3, shard=2), 8, 8)
    with pytest.raises(UserError, match="must not be negative"):
        mesh_shape(Parallel(replicate=-1), 8, 8)


def test_t_and_rotary_tables_stay_float32_where_products_are_bfloat16() -> None:
    asked = ranks.recipe(Parallel(), precision="bf16")
    asked = replace(asked, repa=replace(asked.repa, enabled=False))
    world = parallel.start(asked.train, asked.parallel)
    try:
        learner = Learner(asked, world)
        seen: dict[str, set[torch.dtype]] = {"t": set(), "rotary": set(), "x": set()}
        model = learner.modules.model
        model.time_in.register_forward_pre_hook(lambda _, given: seen["t"].add(given[0].dtype))
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, given: seen["rotary"].add(given[3].dtype))
            block.register_forward_pre_hook(lambda _, given: seen["x"].add(given[0].dtype))
        learner.step(next(batches(open_dataset(asked.data, 0, 8), asked, world, 0)), 0)
    finally:
        parallel.finish()
    assert seen == {"t": {torch.float32}, "rotary": {torch.float32}, "x": {torch.bfloat16}}
    assert {parameter.dtype for _, parameter in learner.parameters} == {torch.float32}
    assert {parameter.grad for _, parameter in learner.parameters} == {None}
