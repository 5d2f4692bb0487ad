"""One job a run's folder: who is refused, and who is not kept waiting by the dead."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.train.commands import ROOT
from train.errors import UserError
from train.run import lock as run_lock
from train.run.lock import LOCK, RunLock


def holder(folder: Path, then: str) -> subprocess.Popen[str]:
    """Start another process that holds the folder, and then does something."""
    imports = "import os, time; from pathlib import Path; from train.run.lock import RunLock"
    code = f"{imports}; lock = RunLock(Path({str(folder)!r})); {then}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    """Its first line: the folder is held from there on."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_job_is_told_host_and_process_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path, "print('held', flush=True); time.sleep(60)") as first:
        assert said(first) == "held"
        try:
            with pytest.raises(UserError) as refused:
                RunLock(tmp_path)
        finally:
            first.kill()
    assert f"host {socket.gethostname()}, process {first.pid}" in str(refused.value)


def test_a_killed_job_blocks_no_restart(tmp_path: Path) -> None:
    with holder(tmp_path, "print('held', flush=True); time.sleep(60)") as first:
        assert said(first) == "held"
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == first.pid
        RunLock(tmp_path).release()


def test_a_forked_worker_of_a_killed_job_blocks_no_restart(tmp_path: Path) -> None:
    then = "child = os.fork(); child or time.sleep(60); print(child, flush=True); time.sleep(60)"
    with holder(tmp_path, then) as first:
        worker = int(said(first))
        first.kill()
        first.wait()
        try:
            os.kill(worker, 0)
            RunLock(tmp_path).release()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_released_or_forgotten_lock_is_free(tmp_path: Path) -> None:
    RunLock(tmp_path).release()
    first = RunLock(tmp_path)
    with pytest.raises(UserError):
        RunLock(tmp_path)
    del first
    RunLock(tmp_path).release()
    assert not (tmp_path / LOCK).exists()
    RunLock(tmp_path / "deep/run").release()
    assert not (tmp_path / "deep").exists()


def test_a_job_on_another_machine_is_taken_for_dead_when_it_gives_no_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "beat": "000000000003"}))
    RunLock(tmp_path).release()


@pytest.mark.parametrize("locks", ["seen here only", "none"])
def test_a_living_job_on_another_machine_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    if locks == "none":

        def refuse(file: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
    stop = threading.Event()
    file = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)

    def live() -> None:
        beat = 0
        while not stop.wait(0.02):
            beat += 1
            os.pwrite(file, json.dumps({"host": "elsewhere", "pid": 7, "beat": f"{beat:012d}"}).encode(), 0)

    other = threading.Thread(target=live)
    other.start()
    try:
        while not (tmp_path / LOCK).read_bytes():
            pass
        with pytest.raises(UserError, match="host elsewhere, process 7"):
            RunLock(tmp_path)
    finally:
        stop.set()
        other.join()
        os.close(file)
