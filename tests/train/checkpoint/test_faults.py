"""Saves that are killed or find a full disk: the old checkpoint stays, and going on gives the uninterrupted bits."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.train.checkpoint.faults import KILLS
from tests.train.commands import ROOT


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every fault, from one driver process (which imports torch once, and forks the jobs)."""
    command = [sys.executable, "-m", "tests.train.checkpoint.faults", str(tmp_path_factory.mktemp("faults"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return results


def assert_ended_as_uninterrupted(outcomes: dict[str, Any], outcome: dict[str, Any]) -> None:
    assert set(outcome["codes"]) == {0}
    assert all("error" not in rank for rank in outcome["ranks"])
    assert outcome["bits"] == outcomes["whole-1"]["bits"]
    assert outcome["steps"][-1] == 8
    assert outcome["left"] == []
    assert outcome["latest"] == "checkpoints/step-00000008"


def test_two_ranks_save_the_bits_that_one_saves(outcomes: dict[str, Any]) -> None:
    assert outcomes["whole-1"]["bits"] == outcomes["whole-2"]["bits"]
    assert outcomes["whole-1"]["steps"] == [6, 8]


@pytest.mark.parametrize("point", KILLS)
def test_a_kill_during_a_save_leaves_the_last_whole_checkpoint(outcomes: dict[str, Any], point: str) -> None:
    first, second = (outcomes[f"kill-{point}"][start] for start in ("first", "second"))
    named = point in ("latest", "retention")
    assert first["codes"] == [-signal.SIGKILL]
    assert first["steps"] == ([2, 4, 6] if named else [2, 4])
    assert first["latest"] == f"checkpoints/step-0000000{6 if point == 'retention' else 4}"
    assert second["ranks"][0]["resumed"] == (6 if named else 4)
    assert second["ranks"][0]["printed"] == ""
    assert_ended_as_uninterrupted(outcomes, second)


@pytest.mark.parametrize("case", ["kill-write-rank-1", "kill-rename-rank-0"])
def test_a_killed_rank_does_not_leave_the_other_waiting(outcomes: dict[str, Any], case: str) -> None:
    first, second = (outcomes[case][start] for start in ("first", "second"))
    assert sorted(first["codes"]) == [-signal.SIGKILL, 0]
    survivor = next(rank for rank in first["ranks"] if rank is not None)
    assert "no longer answer" in survivor["error"]
    assert first["steps"] == [2, 4]
    assert [rank["resumed"] for rank in second["ranks"]] == [4, 4]
    assert_ended_as_uninterrupted(outcomes, second)


@pytest.mark.parametrize(("case", "struck"), [("disk-once", 4), ("no-space", 6)])
def test_one_failed_save_is_a_warning_and_training_goes_on(outcomes: dict[str, Any], case: str, struck: int) -> None:
    first = outcomes[case]["first"]
    printed = first["ranks"][0]["printed"]
    assert printed.count("warning") == 1
    assert f"the checkpoint after step {struck} was not written: [Errno " in printed
    assert printed.strip().endswith(f"checkpoints/step-0000000{struck - 2}")
    assert_ended_as_uninterrupted(outcomes, first)


@pytest.mark.parametrize("case", ["disk-twice", "disk-twice-rank-1"])
def test_a_second_failed_save_stops_all_ranks_and_leaves_the_old_checkpoint(
    outcomes: dict[str, Any], case: str
) -> None:
    first, second = (outcomes[case][start] for start in ("first", "second"))
    errors = {rank["error"] for rank in first["ranks"]}
    assert len(errors) == 1
    assert "the checkpoint after step 6 was not written: [Errno 27] File too large" in errors.pop()
    assert first["steps"] == [2]
    assert first["left"] == []
    assert {rank["resumed"] for rank in second["ranks"]} == {2}
    assert_ended_as_uninterrupted(outcomes, second)
