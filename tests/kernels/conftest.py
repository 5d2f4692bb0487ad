"""Interpreted kernels run in a pytest of their own: Triton decides when a kernel is defined, once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What stands in interpreted/ needs the variable; everything else here must not have it (compilation, opcheck).
NOT_HERE = {"interpreted"} ^ {entry.name for entry in Path(__file__).parent.iterdir() if entry.is_dir()}
collect_ignore_glob = ["test_*.py", *(f"{name}/*" for name in NOT_HERE)] if INTERPRETED else ["interpreted/*"]


@pytest.fixture
def run_interpreted() -> Callable[[str], None]:
    """Run a file of tests/kernels/interpreted under Triton's interpreter; its failures are this test's failure."""

    def run(name: str) -> None:
        triton = pytest.importorskip("triton")
        if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
            pytest.skip("Triton 3.6's interpreter needs numpy < 2.4")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/interpreted/{name}"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return run
