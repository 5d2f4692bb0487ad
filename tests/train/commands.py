"""Runs the project's command-line programs as a user would, on tiny sizes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TINY = [
    "--model.hidden-size",
    "32",
    "--model.num-heads",
    "1",
    "--model.axes-dim",
    "16",
    "16",
    "--model.depth",
    "2",
    "--model.context-in-dim",
    "32",
    "--model.bottleneck-size",
    "16",
    "--routing.end",
    "1",
    "--text.depth",
    "1",
    "--train.batch",
    "8",
    "--train.warmup",
    "2",
    "--train.cooldown",
    "0",
    "--evaluation.prompts",
    "8",
    "--evaluation.grid",
    "4",
    "--evaluation.every",
    "100",
    "--sampling.steps",
    "2",
]
"""Fields that make any preset with 8-pixel patches run in a second."""


def run_program(
    name: str, *arguments: str, cwd: Path | None = None, timeout: int = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run train/<name>.py with one thread, to its end; output and error output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
