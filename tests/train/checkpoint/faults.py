"""Small trainings whose saves are struck by faults, in forked processes; run by test_faults.py.

python -m tests.train.checkpoint.faults <folder> <fault> …  prints as JSON what became of each.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.train.checkpoint.ranks import start
from train.checkpoint import checkpointer as checkpoint
from train.checkpoint import files
from train.checkpoint.checkpointer import Checkpointer
from train.errors import UserError

STEPS, EVERY, STRUCK = 8, 2, 6
"""Steps of a training, steps between saves, and the step whose save is struck."""
SHAPE = (33, 65)

KILLS = {
    "write": ("append", 2),  # a header is on its way to the disk, the numbers behind it are not
    "fsync": ("flush", 1),
    "manifest": ("write_manifest", 1),
    "complete": ("mark_complete", 1),
    "rename": ("publish", 1),
    "latest": ("point_latest", 1),
    "retention": ("remove_old", 1),
}
"""Where a save is killed: before which call of which stage."""


def strike(run: Path, stage: str, call: int, act: Callable[[], None]) -> None:
    """Act before a call of a stage of the save after step `STRUCK`, in this process."""
    original, folder, seen = getattr(files, stage), files.step_folder(run, STRUCK), 0

    def struck(*arguments: Any, **named: Any) -> Any:
        nonlocal seen
        if folder.exists() or folder.with_name(folder.name + files.TEMPORARY).exists():
            seen += 1
            if seen == call:
                act()
        return original(*arguments, **named)

    setattr(files, stage, struck)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(run: Path) -> dict[str, Any]:
    """Train from where the run stands to `STEPS`, saving on the way; what a step draws depends on its number only."""
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None

    def lay(tensor: Tensor) -> Tensor:
        # All ranks drew the same: without a rank to send it, a rank that died is met in a save, and nowhere else.
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    weight, momentum = lay(torch.ones(SHAPE)), lay(torch.zeros(SHAPE))
    tensors = {"model": {"w": weight}, "optimizer": {"w/momentum": momentum}}
    checkpointer = Checkpointer(run, keep=2, timeout=timedelta(seconds=20))
    try:
        found = checkpoint.find_newest(run, checkpointer.group)
        if found is not None:
            checkpoint.load_into(found, tensors, checkpointer.group)
        for step in range(found.step if found else 0, STEPS):
            drawn = lay(torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)))
            momentum.mul_(0.9).add_(drawn * weight)
            weight.sub_(momentum, alpha=0.1)
            if (step + 1) % EVERY == 0:
                checkpointer.save(step + 1, tensors, {}, wait=step + 1 == STEPS)
    finally:
        checkpointer.close()
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return {"resumed": found.step if found else 0, "sum": local.double().sum().item()}


def report(out: Path, act: Callable[[], dict[str, Any]]) -> None:
    """Run a training and write down how it went: its values, its error, what it printed."""
    printed = io.StringIO()
    told: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        try:
            told = act()
        except UserError as error:
            told = {"error": str(error)}
    rank = dist.get_rank() if dist.is_initialized() else 0
    (out.parent / f"{out.name}.{rank}.json").write_text(json.dumps({**told, "printed": printed.getvalue()}))


def run_once(run: Path, ranks: int, prepare: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """One start of a job: exit codes of its ranks, what they reported, and the run's folder after it."""
    out = run.parent / f"{run.name}.report"
    for old in run.parent.glob(f"{out.name}.*"):
        old.unlink()

    def act() -> None:
        prepare()
        report(out, partial(train, run))

    codes = start(ranks, run.parent, act, alone=ranks == 1)
    reports = [run.parent / f"{out.name}.{rank}.json" for rank in range(ranks)]
    return {
        "codes": codes,
        "ranks": [json.loads(r.read_text()) if r.exists() else None for r in reports],
        "steps": [int(p.name[5:]) for p in checkpoint.complete(run)],
        "left": sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(files.TEMPORARY)),
        "latest": (run / "latest").read_text().strip() if (run / "latest").exists() else "",
        "bits": bits(run),
    }


def bits(run: Path) -> str:
    """All numbers of the newest checkpoint, as hexadecimal digits of a hash."""
    saved = checkpoint.load(checkpoint.complete(run)[-1])
    digest = hashlib.sha256()
    for section, content in sorted(saved.tensors.items()):
        for name, tensor in sorted(content.items()):
            digest.update(f"{saved.step}/{section}/{name}".encode())
            digest.update(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def killed(root: Path, point: str, *, ranks: int = 1, victim: int = 0) -> dict[str, Any]:
    """A job whose save is killed at a point, on one rank; then the same job again."""
    stage, call = KILLS[point]
    run = root / f"{point}-{ranks}-{victim}"

    def prepare() -> None:
        if not dist.is_initialized() or dist.get_rank() == victim:
            strike(run, stage, call, kill)

    return {"first": run_once(run, ranks, prepare), "second": run_once(run, ranks)}


def full_disk(root: Path, steps: tuple[int, ...], *, ranks: int = 1, victim: int = 0) -> dict[str, Any]:
    """A job whose disk takes no more than a kilobyte a file in the saves after some steps, on one rank; then again."""
    run = root / f"disk-{len(steps)}-{ranks}"
    original = files.write_shard

    def limited(path: Path, pieces: Any) -> files.Entry:
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        if path.parent.name in [f"step-{step:08d}{files.TEMPORARY}" for step in steps]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, free[1]))
        try:
            return original(path, pieces)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)

    def prepare() -> None:
        if not dist.is_initialized() or dist.get_rank() == victim:
            files.write_shard = limited

    return {"first": run_once(run, ranks, prepare), "second": run_once(run, ranks)}


def no_space(root: Path) -> dict[str, Any]:
    """A save in whose middle the disk says that it is full."""
    run = root / "no-space"
    return {"first": run_once(run, 1, lambda: strike(run, "append", 2, full)), "second": run_once(run, 1)}


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    results: dict[str, Any] = {"whole-1": run_once(root / "whole-1", 1), "whole-2": run_once(root / "whole-2", 2)}
    for point in KILLS:
        results[f"kill-{point}"] = killed(root, point)
    results["kill-write-rank-1"] = killed(root, "write", ranks=2, victim=1)
    results["kill-rename-rank-0"] = killed(root, "rename", ranks=2, victim=0)
    results["disk-once"] = full_disk(root, (4,))
    results["disk-twice"] = full_disk(root, (4, 6))
    results["disk-twice-rank-1"] = full_disk(root, (4, 6), ranks=2, victim=1)
    results["no-space"] = no_space(root)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
