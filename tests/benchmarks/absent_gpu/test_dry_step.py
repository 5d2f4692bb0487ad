"""The training step on an absent H200: held to its budget, and red where a known fault comes back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dry_step
from benchmarks.absent_gpu import libraries
from benchmarks.absent_gpu.trainer import Setting

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables under which torch sees the absent GPU."""
    try:
        return libraries.environment()
    except libraries.AbsentGPUError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def seen(environment: dict[str, str]) -> dict[str, Any]:
    """What `seen.py` prints."""
    command = [sys.executable, "-m", "tests.benchmarks.absent_gpu.seen"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", ["prx-512 --small", "prx-512 --small --ranks 32 --nodes 4", "prx-1024 --small"])
def test_the_step_keeps_to_its_budget(setting: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "benchmarks.dry_step", *setting.split(), "--builds", "needed", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "not compared" in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.timeout(600)
def test_a_step_counted_twice_costs_the_same(seen: dict[str, Any]) -> None:
    assert seen["seen"]["sound"] == []


def test_a_step_breaks_no_graph_and_waits_for_nothing(seen: dict[str, Any]) -> None:
    figures = seen["figures"]
    names = ("graph breaks", "waits", "host kernels", "wrong layouts", "failed builds", "spilling kernels")
    assert {name: figures[name] for name in names} == dict.fromkeys(names, 0)
    assert figures["launches"] > 100
    assert figures["TFLOP"] > 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("table", "KeyError: 0"),
        ("graph break", "graph_break"),
        ("float32", "grew: denoiser, eager, _to_copy"),
        ("spill", "spilling kernels: "),
        ("wait", "waits: 1, the budget is 0"),
    ],
)
def test_a_fault_that_comes_back_is_seen(fault: str, said: str, seen: dict[str, Any]) -> None:
    assert said in "\n".join(seen["seen"][fault])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prx-512", "--batch", "0"], "must be a whole number from 1"),
        (["prx-512", "--ranks", "32", "--nodes", "5"], "must be a multiple of --nodes 5"),
        (["prx-512", "--check", "--builds", "none"], "leave --builds none out"),
        (["shapes"], "invalid choice"),
        (["prx-512", "--update", "--muon.ns-steps", "4"], "a budget is one of the preset: leave --muon.ns-steps 4 out"),
    ],
)
def test_a_wrong_command_line_is_told(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dry_step.parse(arguments)
    assert said in capsys.readouterr().err


def test_settings_are_those_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = dry_step.parse(["prx-512", "--small", "--muon.ns-steps", "4", "--repa.no-enabled"])
    recipe = Setting("prx-512", 32, words=tuple(chosen.words)).recipe
    assert (recipe.muon.ns_steps, recipe.repa.enabled, recipe.train.batch) == (4, False, 32)
    assert dry_step.main(["prx-512", "--muon.ns-stepz", "4"]) == 2
    assert "did you mean 'muon.ns_steps'" in capsys.readouterr().err
