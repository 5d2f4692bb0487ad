"""Muon on 1, 2 and 4 gloo ranks. All checks run in one go (ranks.py); a test here reads what one of them said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import SCHEDULE

ROOT = Path(__file__).resolve().parents[3]
CASES = [(check.__name__, ranks) for ranks, checks in SCHEDULE.items() for check in checks]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.kernels.muon.ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("check", "ranks"), CASES)
def test_on_ranks(check: str, ranks: int, said: Path) -> None:
    for rank in range(ranks):
        file = said / f"{check}-{ranks}-{rank}"
        assert file.exists(), f"rank {rank} never came to it: another one failed before"
        assert file.read_text() == "ok", file.read_text()
