"""Stop signals that reach a whole process group, data workers included, as torchrun, Slurm and terminals send them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.checkpoint import checkpointer as checkpoint
from train.ranks import faults
from train.ranks.faults import AGAIN_SECONDS, EXIT_RESUME, StopSignals
from train.ranks.parallel import World

from ..commands import ROOT, TINY

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def begin(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """A run of many steps with two data workers, in a process group of its own."""
    command = [sys.executable, *launcher, str(ROOT / "train/speedrun.py"), "scenes", *TINY]
    command += ["--data.workers", "2", "--checkpoint.every", "2", "--output.folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def has_worker(pid: int) -> bool:
    """Whether a process has a spawned child beside multiprocessing's resource tracker."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
        except (FileNotFoundError, ProcessLookupError):
            pass
    return False


def group(number: int) -> list[str]:
    """What `/proc` says of a process group's members, without those that only wait to be reaped."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = file.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, member_of = stat.rpartition(")")[2].split()[:3]
        if int(member_of) == number and state not in "ZX":
            found.append(stat)
    return found


def stopped_at(output: str) -> str:
    """The checkpoint that a run says it stopped with."""
    found = re.findall(r"stopped at step (\d+)", output)
    assert len(found) == 1, output
    return f"step-{int(found[0]):08d}"


def end(process: subprocess.Popen[str]) -> str:
    """What the run printed; nothing of its group may live on."""
    output, _ = process.communicate(timeout=100)
    until = time.monotonic() + 20
    while running := group(process.pid):
        assert time.monotonic() < until, running
        time.sleep(0.1)
    return output


def test_a_group_that_is_asked_to_stop_saves(tmp_path: Path) -> None:
    with begin(tmp_path) as process:
        wait_until(process, lambda: bool(checkpoint.complete(tmp_path / "scenes")))
        os.killpg(process.pid, signal.SIGTERM)
        output = end(process)
    assert process.returncode == EXIT_RESUME, output
    assert "the same command goes on from" in output
    assert checkpoint.complete(tmp_path / "scenes")[-1].name == stopped_at(output)


def test_one_request_may_come_twice_and_while_workers_start(tmp_path: Path) -> None:
    """`uv run` passes on the Ctrl-C that the terminal has sent; torchrun sends SIGTERM behind it."""
    with begin(tmp_path) as process:
        wait_until(process, lambda: has_worker(process.pid))
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
            time.sleep(0.05)
        output = end(process)
    assert process.returncode == EXIT_RESUME, output
    assert "Traceback" not in output


def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    with begin(tmp_path, *TORCHRUN) as process:
        wait_until(process, lambda: bool(checkpoint.complete(tmp_path / "scenes")))
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=100)[0]
    assert "DataLoader worker" not in output
    assert checkpoint.complete(tmp_path / "scenes")[-1].name == stopped_at(output)


def test_another_ctrl_c_stops_at_once_and_another_sigterm_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    with StopSignals(World(0, 1, torch.device("cpu"))) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += AGAIN_SECONDS
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked
        now[0] += 0.1
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
