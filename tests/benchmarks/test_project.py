"""The projection: RECIPE.md's floors, bytes by formula against those that ranks move, arithmetic on known cases."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import project
from benchmarks.collectives import Moved, Network, fsdp_step, muon_owners, muon_step, sharded
from benchmarks.flop_table import RECIPE
from benchmarks.project import IDEAL, Assumptions, Speed, floors
from benchmarks.roofline import H200_MATMUL, STAGE_1, STAGE_2, newton_schulz, prx_muon_shapes
from tests.benchmarks import result_files

ROOT = Path(__file__).resolve().parents[2]


def test_floors_are_those_of_the_recipe() -> None:
    """RECIPE.md's floor spreads the plain Newton-Schulz over 32 ranks: its sums, milliseconds, and 1.9 h."""
    spread = newton_schulz(prx_muon_shapes(), "plain") / 32
    sums = [seconds * H200_MATMUL + spread for seconds in floors().seconds]
    for work, expected in zip(sums, RECIPE["sum, text cached, Newton-Schulz spread"], strict=True):
        assert work / 1e12 == pytest.approx(expected, rel=0.005)
    assert [work / H200_MATMUL * 1e3 for work in sums] == pytest.approx([53, 74], abs=0.5)
    assert [step.total() for step in (STAGE_1, STAGE_2)] == pytest.approx(sums)
    assert sum(stage.hours for stage in project.project(floors(), IDEAL)) == pytest.approx(1.9, abs=0.05)


def test_formulas_give_the_bytes_that_fsdp2_and_muon_move_on_two_and_four_ranks() -> None:
    command = [sys.executable, "-m", "benchmarks.project", "--check"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if " rank " in line and line.endswith(("equal", "DIFFERENT"))]
    assert len(rows) == 3 * (2 + 4)
    assert all(line.endswith("equal") for line in rows)
    assert all(int(line.split()[-2].replace(",", "")) > 10_000 for line in rows)


def test_collectives_are_counted_by_what_comes_from_others() -> None:
    """One rank: nothing comes from others, but an all-reduce's size is noted; unknown collectives are refused."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with Moved(0) as moved:
            dist.all_gather_into_tensor(torch.empty(4), torch.ones(4))
            dist.all_to_all_single(torch.empty(4), torch.ones(4), [4], [4])
            dist.all_reduce(torch.ones(3))
        assert dict(moved.nbytes) == {"all_gather": 0, "all_to_all": 0, "all_reduce": 12}
        with pytest.raises(ValueError, match="collective broadcast_ is not counted"), Moved(0):
            dist.broadcast(torch.ones(2), 0)
    finally:
        dist.destroy_process_group()


def test_volumes_by_hand() -> None:
    assert sharded([(5, 3), (4,), (2,)], 4) == [8 * 3, 4, 4]
    volumes = fsdp_step([[(8, 2)]], [(4,)], 4)
    assert volumes.all_gather == 0.75 * 2 * (2 * 16 + 4)
    assert volumes.reduce_scatter == 0.75 * 4 * (16 + 4)
    assert fsdp_step([[(8, 2)]], [(4,)], 1) == replace(volumes, all_gather=0.0, reduce_scatter=0.0)
    shapes = [(8, 4), (8, 4)]
    assert sorted(muon_owners(shapes, 2)) == [0, 1]
    # Half of the own matrix comes, and the update of the half that is held of the other.
    assert muon_step(shapes, 2, 0).all_to_all == 2 * (4 * 4 + 4 * 4)
    everything = sum(muon_step(prx_muon_shapes(), 32, rank).all_to_all for rank in range(32))
    numbers = sum(rows * columns for rows, columns in prx_muon_shapes())
    assert everything == pytest.approx(2 * 2 * numbers * 31 / 32)


def test_a_network_s_seconds_by_hand() -> None:
    network = Network(4, 8, nvlink=100.0, infiniband=10.0, nvlink_latency=1.0, infiniband_latency=2.0)
    assert network.all_gather(320.0) == pytest.approx(3 * (10 / 10 + 2) + 7 * (40 / 100 + 1))
    assert network.all_to_all(31.0) == pytest.approx(max(24 / 10 + 2, 7 / 100 + 1))
    node = replace(network, nodes=1)
    assert node.all_gather(80.0) == pytest.approx(7 * (10 / 100 + 1))
    assert node.all_to_all(7.0) == pytest.approx(7 / 100 + 1)
    assert Network(1, 1).all_gather(1e9) == Network(1, 1).all_to_all(1e9) == 0.0


def test_hours_and_dollars_of_known_step_times() -> None:
    """100 and 135 ms on an ideal network are RECIPE.md's 3.5 h, and what is left over by Muon's owners."""
    speed = Speed((0.100, 0.135), "the command line", newton_schulz=math.inf, copy=math.inf)
    stages = project.project(speed, IDEAL)
    assert [stage.seconds for stage in stages] == pytest.approx([0.100, 0.135])
    assert sum(stage.hours for stage in stages) == pytest.approx(3.528, abs=1e-3)
    printed = "\n".join(project.lines(speed, IDEAL))
    assert "in all 3.53 h and $226" in printed
    assert "step times from the command line" in printed
    alone = project.project(speed, replace(IDEAL, network=replace(IDEAL.network, nodes=1, gpus=1)))
    assert alone[0].seconds == pytest.approx(32 * 0.100)


def test_communication_hides_behind_computation_as_far_as_there_is_some() -> None:
    slow = Network(infiniband=1e9)
    speed = floors()
    hidden = project.project(speed, replace(Assumptions(), network=slow, overlap=1.0))[0].parts
    shown = project.project(speed, replace(Assumptions(), network=slow, overlap=0.0))[0].parts
    difference = shown["FSDP2, not hidden"] - hidden["FSDP2, not hidden"]
    assert difference == pytest.approx(hidden["forward, teachers, backward"])
    assert hidden["FSDP2, not hidden"] > 0
    fast = project.project(speed, replace(Assumptions(), overlap=1.0))[0].parts
    assert fast["FSDP2, not hidden"] == 0.0


def test_every_assumption_is_printed_with_its_value() -> None:
    assumed = Assumptions(
        Network(3, 5, nvlink=111e9, infiniband=22e9), overlap=0.77, buckets=9, checkpoint_every=1234,
        host_copy=17e9, evaluation_every=4321, evaluation_seconds=66.0, start_seconds=88.0, dollars=9.5,
    )  # fmt: skip
    printed = "\n".join(project.lines(floors(), assumed))
    for value in ("3 x 5", "111 GB/s", "22 GB/s", "77%", "9 buckets", "1,234", "17 GB/s", "4,321", "66 s", "88 s"):
        assert value in printed, value
    assert "$9.5 a GPU-hour" in printed
    assert "no step has been timed" in printed


def test_measured_steps_are_read_from_result_files(tmp_path: Path) -> None:
    speed = project.measured([result_files.write(tmp_path / "h200.json")])
    assert speed.seconds == (0.08, 0.12)
    assert speed.known == "measured: h200.json"
    assert speed.copy == 4e12
    work = sum(project.gram_flop(shape) for shape in prx_muon_shapes())
    assert speed.newton_schulz == pytest.approx(work / 36e-3)
    one_stage = [row for row in result_files.rows() if row.case != result_files.SECOND]
    with pytest.raises(ValueError, match="no measured step without optimizer at both 512 and 1024"):
        project.measured([result_files.write(tmp_path / "half.json", one_stage)])
    with pytest.raises(ValueError, match="GPU rows only"):
        project.measured([result_files.write(tmp_path / "cpu.json", on_gpu=False)])
