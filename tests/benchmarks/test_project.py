"""The projection: docs/recipe.md's floors, bytes by formula against those that ranks move, arithmetic."""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import project, replay, roofline
from benchmarks.collectives import Moved
from benchmarks.flop_table import RECIPE
from benchmarks.project import IDEAL, Rate, Speed, floors
from benchmarks.replay import Case
from benchmarks.roofline import H200_MATMUL, STAGE_1, STAGE_2, newton_schulz, owner_sample, prx_muon_shapes
from prx_kernels.muon.owners import Layout
from tests.benchmarks import result_files
from tests.train.commands import run_program
from train.recipes import Parallel, prx_512, prx_1024
from train.run import hours
from train.run.collectives import Network, Volumes, fsdp_step, gram_flop, muon_exchange, muon_step, sharded
from train.run.hours import Assumptions

ROOT = Path(__file__).resolve().parents[2]


def test_floors_are_those_of_the_recipe() -> None:
    """docs/recipe.md's floor spreads the plain Newton-Schulz over 32 ranks: its sums, milliseconds, and 1.9 h."""
    spread = newton_schulz(prx_muon_shapes(), "plain") / 32
    sums = [seconds * H200_MATMUL + spread for seconds in floors().seconds]
    for work, expected in zip(sums, RECIPE["sum, text cached, Newton-Schulz spread"], strict=True):
        assert work / 1e12 == pytest.approx(expected, rel=0.005)
    assert [work / H200_MATMUL * 1e3 for work in sums] == pytest.approx([53, 74], abs=0.5)
    assert [step.total() for step in (STAGE_1, STAGE_2)] == pytest.approx(sums)
    assert sum(stage.hours for stage in project.project(floors(), IDEAL)) == pytest.approx(1.9, abs=0.05)


def test_formulas_give_the_bytes_that_fsdp2_and_muon_move_under_fsdp_hsdp_and_ddp() -> None:
    command = [sys.executable, "-m", "benchmarks.project", "--check"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(.+), rank (\d), (\S+) +[\d,]+ +([\d,]+)  (equal|DIFFERENT)$", done.stdout, re.MULTILINE)
    assert {verdict for *_, verdict in rows} == {"equal"}
    expected = {str(case): case.ranks * KINDS[case.nodes, case.gpus] for case in replay.CASES}
    assert Counter(case for case, *_ in rows) == expected
    assert {"1 x 2 ranks", "1 x 4 ranks", "2 x 2 ranks", "2 x 2 ranks, resharded"} <= expected.keys()
    moved = [int(count.replace(",", "")) for _, _, kind, count, _ in rows if kind != "all-reduce"]
    assert min(moved) > 10_000


KINDS = {(1, 2): 4, (1, 4): 4, (2, 2): 6, (2, 1): 2}
"""Collectives that move anything: FSDP's four, over replicas two more, and those alone where nothing is sharded."""


@pytest.mark.parametrize("kind", [field.name for field in fields(Volumes)])
def test_a_wrong_volume_fails_the_check(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any kind, on any one rank, by one byte."""
    case = Case(2, 2)
    counted = [asdict(replay.expected(case, rank)) for rank in range(case.ranks)]
    monkeypatch.setattr(replay, "moved", lambda _: counted)
    assert all(line.endswith("equal") for line in project.check([case])[1:])
    counted[3][kind] += 1
    with pytest.raises(SystemExit, match=rf"rank 3, {kind.replace('_', '-')} .* DIFFERENT\n"):
        project.check([case])


def test_the_volumes_of_another_layout_are_others() -> None:
    """What the projection once had, FSDP over all ranks and two gathers, is not what the presets move."""
    cases = [Case(1, 4), Case(1, 4, reshard=True), Case(2, 2), Case(2, 2, reshard=True), Case(4, 1)]
    volumes = [replay.expected(case, 0) for case in cases]
    assert len(set(volumes)) == len(cases)
    assert volumes[1].all_gather == 2 * volumes[0].all_gather
    assert volumes[0].replica_all_reduce == 0 < volumes[2].replica_all_reduce


def test_collectives_are_counted_by_what_comes_from_others() -> None:
    """One rank: nothing comes from others; unknown collectives are refused."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with Moved() as moved:
            dist.all_gather_into_tensor(torch.empty(4), torch.ones(4))
            dist.all_to_all_single(torch.empty(4), torch.ones(4), [4], [4])
            dist.all_to_all_single(torch.empty(4), torch.ones(4))
            dist.all_reduce(torch.ones(3))
        assert dict(moved.nbytes) == {"all_gather": 0, "all_to_all": 0, "all_reduce": 0}
        with Moved(dist.group.WORLD) as moved:
            dist.all_reduce(torch.ones(3))
        assert dict(moved.nbytes) == {"replica_all_reduce": 0}
        with pytest.raises(ValueError, match="collective broadcast_ is not counted"), Moved():
            dist.broadcast(torch.ones(2), 0)
    finally:
        dist.destroy_process_group()


def test_presets_are_laid_out_as_the_trainer_does() -> None:
    """HSDP of 8 shards and 4 replicas on 4 x 8 GPUs, weights kept for backward; one node is FSDP, nodes of one DDP."""
    for recipe in (prx_512(), prx_1024()):
        assert recipe.parallel == Parallel()
        found = {
            (nodes, gpus): hours.rank_layout(recipe.parallel, Network(nodes, gpus), nodes * gpus - 1)
            for nodes, gpus in ((4, 8), (1, 8), (3, 5), (4, 1), (1, 1))
        }
        assert found[4, 8] == Layout(shards=8, shard=7, replicas=4, replica=3)
        assert found[1, 8] == Layout(shards=8, shard=7)
        assert found[3, 5] == Layout(shards=5, shard=4, replicas=3, replica=2)
        assert found[4, 1] == Layout(replicas=4, replica=3)
        assert found[1, 1] == Layout()
    words = [project.described(layout).split(":")[0] for layout in found.values()]
    assert words == ["HSDP", "FSDP", "HSDP", "DDP", "one GPU"]


def test_volumes_by_hand() -> None:
    assert sharded([(5, 3), (4,), (2,)], 4) == [8 * 3, 4, 4]
    groups = [[(8, 2)], [(4,)]]
    volumes = fsdp_step(groups, Layout(shards=4), reshard=False)
    assert volumes == Volumes(all_gather=0.75 * 2 * (16 + 4), reduce_scatter=0.75 * 4 * (16 + 4))
    twice = fsdp_step(groups, Layout(shards=4), reshard=True)
    assert twice == replace(volumes, all_gather=2 * volumes.all_gather)
    # Each rank's quarter is 5 numbers of 4 bytes; a ring of three brings 4/3 of them.
    replicated = fsdp_step(groups, Layout(shards=4, replicas=3), reshard=False)
    assert replicated == replace(volumes, replica_all_reduce=pytest.approx(4 / 3 * 5 * 4))
    assert fsdp_step(groups, Layout(), reshard=False) == Volumes()


def test_muon_s_volumes_by_hand() -> None:
    shapes = [(8, 4), (8, 4)]
    # Half of the own matrix comes, and the update of the half that is held of the other.
    assert muon_step(shapes, Layout(shards=2)) == Volumes(all_to_all=2 * (4 * 4 + 4 * 4))
    # One matrix a rank: as before among two of its replica, then the updates of its rows of the two of the other one.
    four = [(8, 4)] * 4
    assert sorted(muon_exchange(four, Layout(shards=2, replicas=2)).owners) == [0, 1, 2, 3]
    for rank in range(4):
        layout = Layout(shards=2, shard=rank % 2, replicas=2, replica=rank // 2)
        assert muon_step(four, layout) == Volumes(all_to_all=2 * (4 * 4 + 4 * 4), replica_all_gather=2 * (2 * 4 * 4))
    assert muon_step(shapes, Layout(replicas=2)) == Volumes(replica_all_gather=2 * (8 * 4))
    everything = sum(muon_step(prx_muon_shapes(), Layout(shards=32, shard=rank)).all_to_all for rank in range(32))
    numbers = sum(rows * columns for rows, columns in prx_muon_shapes())
    assert everything == pytest.approx(2 * 2 * numbers * 31 / 32)
    # Under HSDP every replica sends each matrix that it owns to one of its 8 shards and back, and to 3 other replicas.
    presets = [muon_step(prx_muon_shapes(), Layout(8, r % 8, None, 4, r // 8)) for r in range(32)]
    assert sum(volumes.all_to_all for volumes in presets) == pytest.approx(2 * 2 * numbers * 7 / 8)
    assert sum(volumes.replica_all_gather for volumes in presets) >= 2 * numbers * 3


def test_a_network_s_seconds_by_hand() -> None:
    network = Network(4, 8, nvlink=100.0, infiniband=10.0, nvlink_latency=1.0, infiniband_latency=2.0)
    # 320 bytes in all, of which a rank holds 10.
    assert network.ring(310.0) == pytest.approx(3 * (10 / 10 + 2) + 7 * (40 / 100 + 1))
    assert network.ring(310.0, calls=5) == pytest.approx(3 * (10 / 10 + 5 * 2) + 7 * (40 / 100 + 5 * 1))
    assert network.all_to_all(31.0) == pytest.approx(max(24 / 10 + 2, 7 / 100 + 1))
    node = replace(network, nodes=1)
    assert node.ring(70.0) == pytest.approx(7 * (10 / 100 + 1))
    assert node.all_to_all(7.0, calls=3) == pytest.approx(7 / 100 + 3 * 1)
    assert Network(1, 1).ring(1e9) == Network(1, 1).all_to_all(1e9) == 0.0


def test_a_shard_group_is_a_node_and_replicas_are_on_its_rails() -> None:
    network = Network(4, 8)
    assert network.groups(Layout(shards=8, replicas=4)) == (Network(1, 8), Network(4, 1))
    assert network.groups(Layout(shards=16, replicas=2)) == (Network(2, 8), Network(2, 1))
    assert network.groups(Layout(shards=2, replicas=16)) == (Network(1, 2), Network(4, 4))
    for layout in (Layout(shards=8), Layout(shards=32, replicas=2), Layout(shards=3, replicas=4)):
        with pytest.raises(ValueError, match="must fill 4 nodes of 8 GPUs"):
            network.groups(layout)


def test_seconds_of_the_presets_are_those_of_their_volumes() -> None:
    """PRX on 4 x 8 GPUs: bytes alone by the layout's own arithmetic, each over the link that it travels by."""
    network = Network(nvlink_latency=0.0, infiniband_latency=0.0)
    settings = prx_512().parallel
    layout = hours.rank_layout(settings, network)
    numbers = 1.177e9
    within, across = (2 + 4) * numbers * 7 / 8 / network.nvlink, 2 * 3 / 4 * 4 * numbers / 8 / network.infiniband
    assert hours.fsdp_seconds(STAGE_1.config, layout, settings, network) == pytest.approx(within + across, rel=1e-3)
    resharded = hours.fsdp_seconds(STAGE_1.config, layout, replace(settings, reshard_after_forward=True), network)
    assert resharded == pytest.approx(within * 8 / 6 + across, rel=1e-3)
    latency = replace(network, nvlink_latency=1.0, infiniband_latency=100.0)
    # 17 groups, each gathered and scattered in 7 hops, and all-reduced in 2 x 3.
    hops = hours.fsdp_seconds(STAGE_1.config, layout, settings, latency)
    assert hops == pytest.approx(17 * (2 * 7 * 1.0 + 6 * 100.0), rel=1e-3)
    # Shards of one copy, not of all GPUs, are what a GPU passes over and stages.
    speed = replace(floors(), copy=1.0)
    parts = project.project(speed, replace(Assumptions(), network=network))[0].parts
    assert parts["clipping, optimizer: passes"] == pytest.approx(project.pass_bytes(STAGE_1) / 8)
    staged = hours.state_bytes(STAGE_1.config) / 8 / 20e9 / 1000
    assert parts["checkpoints"] == pytest.approx(staged)


def test_hours_and_dollars_of_known_step_times() -> None:
    """100 and 135 ms on an ideal network are docs/recipe.md's 3.5 h, and what is left over by Muon's owners."""
    instant = {project.WHOLE_MODEL: Rate(math.inf, "no time at all")}
    speed = Speed((0.100, 0.135), "the command line", newton_schulz=instant, copy=math.inf)
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
        Network(3, 5, nvlink=111e9, infiniband=22e9), overlap=0.77, checkpoint_every=1234,
        host_copy=17e9, evaluation_every=4321, evaluation_seconds=66.0, start_seconds=88.0, dollars=9.5,
    )  # fmt: skip
    printed = "\n".join(project.lines(floors(), assumed))
    for value in (
        "3 x 5",
        "111 GB/s",
        "22 GB/s",
        "77%",
        "3 replicas of the weights in 5 shards",
        "1,234",
        "17 GB/s",
        "4,321",
        "66 s",
        "88 s",
    ):
        assert value in printed, value
    assert "$9.5 a GPU-hour" in printed
    assert "no step has been timed" in printed


def test_measured_steps_are_read_from_result_files(tmp_path: Path) -> None:
    speed = project.measured([result_files.write(tmp_path / "h200.json")])
    assert speed.seconds == (0.08, 0.12)
    assert speed.known == "measured: h200.json"
    assert speed.copy == 4e12
    work = sum(gram_flop(shape) for shape in prx_muon_shapes())
    assert speed.newton_schulz.keys() == {112}
    assert speed.newton_schulz[112].flop_per_second == pytest.approx(work / 36e-3)
    assert "TFLOP/s (measured of all 112 of PRX in h200.json); the fullest owner, with 4" in _printed(speed)
    one_stage = [row for row in result_files.rows() if row.case != result_files.SECOND]
    with pytest.raises(ValueError, match="no measured step without optimizer at both 512 and 1024"):
        project.measured([result_files.write(tmp_path / "half.json", one_stage)])
    with pytest.raises(ValueError, match="GPU rows only"):
        project.measured([result_files.write(tmp_path / "cpu.json", on_gpu=False)])


def test_a_step_of_fewer_pictures_than_the_recipe_s_is_no_step_of_the_recipe(tmp_path: Path) -> None:
    halves = [replace(row, case=row.case.replace("px x 32", "px x 16")) for row in result_files.rows()]
    assert any("512 px x 16" in row.case for row in halves)
    with pytest.raises(ValueError, match="recipe's 32 and 16 pictures"):
        project.measured([result_files.write(tmp_path / "h100.json", halves)])


def test_an_owner_s_matrices_run_at_the_rate_of_the_nearest_number_measured(tmp_path: Path) -> None:
    """On 4 x 8 GPUs the fullest owner holds 4: with rows of 3 and 6 it takes that of 3, on one GPU that of all."""
    newton = next(row for row in result_files.rows() if row.case == "all 112 of PRX")
    owned = [replace(newton, case=f"an owner's {count}", seconds=count * 1e-3) for count in (3, 6)]
    others = [replace(owned[0], way="plain"), replace(owned[0], clock="wall"), replace(owned[0], op="symmetric")]
    wrong = [replace(row, case="an owner's 4", seconds=1.0) for row in others]
    speed = project.measured([result_files.write(tmp_path / "h200.json", [*result_files.rows(), *owned, *wrong])])
    assert speed.newton_schulz.keys() == {3, 6, 112}
    work = sum(gram_flop(shape) for shape in owner_sample(prx_muon_shapes(), 3))
    assert speed.orthogonalising(4) == Rate(pytest.approx(work / 3e-3), "measured of an owner's 3 in h200.json")
    assert [speed.orthogonalising(count) for count in (5, 112)] == [speed.newton_schulz[6], speed.newton_schulz[112]]
    assert "(measured of an owner's 3 in h200.json); the fullest owner, with 4" in _printed(speed)
    layout = hours.rank_layout(prx_512().parallel, Network())
    count, operations = hours.fullest_owner(STAGE_1.config, layout)
    assert count == 4
    part = project.project(speed, Assumptions())[0].parts["Newton-Schulz, fullest owner"]
    assert part == pytest.approx(operations / work * 3e-3)


def test_owners_samples_are_those_of_the_benchmark() -> None:
    from benchmarks.test_newton_schulz import LISTS, PRX

    assert LISTS["an owner's 3"] == owner_sample(PRX, 3)
    full = owner_sample(prx_muon_shapes(), 112)
    assert sorted(full) == sorted(prx_muon_shapes())
    assert [gram_flop(shape) for shape in owner_sample(full, 4)] == sorted(
        (gram_flop(shape) for shape in owner_sample(full, 4)), reverse=True
    )


def test_the_command_prints_the_floors_first() -> None:
    command = [sys.executable, "-m", "benchmarks.project"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    printed = done.stdout.splitlines()
    assert printed[: len(roofline.lines())] == roofline.lines()
    assert "both stages at the ceiling: 1.89 h" in printed


def _printed(speed: Speed) -> str:
    return "\n".join(project.lines(speed, Assumptions()))


def test_the_command_prints_the_line_of_the_dry_run_and_its_parts() -> None:
    """One number: the longer table's sum is the line's, and the line is what speedrun.py --dry-run prints."""
    dry_run = run_program("speedrun", "prx-24h", "--dry-run").stdout
    stages = project.project(None, Assumptions())
    for stage in stages:
        assert stage.line() in dry_run
        assert stage.line() in "\n".join(project.lines(None, Assumptions()))
        assert stage.seconds == sum(stage.parts.values())
        assert "counted step" in stage.stands_on
    whole = sum(stage.hours for stage in stages)
    assert f"both stages: {whole:.2f} h, ${whole * 64:,.0f}" in dry_run
    assert f"in all {whole:.2f} h and ${whole * 64:,.0f}" in "\n".join(project.lines(None, Assumptions()))
