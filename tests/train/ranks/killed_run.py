"""A run that is killed again and again, against one that is left alone: their last checkpoints must be equal.

python tests/train/ranks/killed_run.py --kills 10 --minutes 30 --out OUT pictograms --data.path FOLDER …

Both run at once, each with one thread. The second gets SIGKILL, its data workers too, at random times spread over
`--minutes`, and is started again by the same command. Prints when it was killed and where it went on.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[0] = str(ROOT)

from train.checkpoint import checkpointer as checkpoint  # noqa: E402


def start(words: list[str], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """One training process in a process group of its own, so that its workers die with it."""
    command = [sys.executable, str(ROOT / "train/speedrun.py"), *words, "--output.folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
    )


def last_checkpoint(folder: Path) -> checkpoint.Saved:
    (run,) = (path.parent for path in folder.glob("*/config.json"))
    return checkpoint.load(checkpoint.complete(run)[-1])


def differences(one: checkpoint.Saved, other: checkpoint.Saved) -> list[str]:
    """Names of tensors that are not equal bit for bit, or are in one only."""
    flat = [{f"{part}/{k}": v for part, content in s.tensors.items() for k, v in content.items()} for s in (one, other)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return [n for n in names if n not in flat[0] or n not in flat[1] or not torch.equal(flat[0][n], flat[1][n])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="killed_run.py", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=30.0, help="over which kills are spread")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    asked, words = parser.parse_known_args()
    asked.out.mkdir(parents=True)
    draw = random.Random(asked.seed)
    times = sorted(draw.uniform(5.0, 60.0 * asked.minutes) for _ in range(asked.kills))
    began = time.monotonic()
    with (asked.out / "alone.log").open("wb") as alone_log, (asked.out / "killed.log").open("wb") as killed_log:
        alone = start(words, asked.out / "alone", alone_log)
        killed = start(words, asked.out / "killed", killed_log)
        done = 0
        while killed.poll() is None or (killed.returncode == -signal.SIGKILL):
            if done < len(times) and time.monotonic() - began > times[done] and killed.poll() is None:
                os.killpg(killed.pid, signal.SIGKILL)
                killed.wait()
                done += 1
                print(f"kill {done} after {time.monotonic() - began:.0f} s", flush=True)
                killed = start(words, asked.out / "killed", killed_log)
            time.sleep(0.05)
        alone.wait()
    saved = [last_checkpoint(asked.out / name) for name in ("alone", "killed")]
    odd = differences(*saved)
    for line in (asked.out / "killed.log").read_text().splitlines():
        if line.startswith(("going on", "warning")):
            print(line)
    steps = [one.step for one in saved]
    print(
        f"{done} kills in {(time.monotonic() - began) / 60:.1f} minutes; exit codes {alone.returncode} and "
        f"{killed.returncode}; steps {steps[0]} and {steps[1]}; {len(odd)} of "
        f"{sum(map(len, saved[0].tensors.values()))} tensors differ {odd[:5]}"
    )
    return int(bool(odd) or steps[0] != steps[1] or alone.returncode != 0 or killed.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
