"""Checkpoints of a run: `checkpoints/step-N/` with safetensors, a SHA-256 manifest and `COMPLETE`.

Written beside their place, flushed to disk, then renamed: a folder called step-N is whole or was damaged later, and
damage is found by its hashes when it is loaded.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.errors import UserError
from train.run_folder import CHECKPOINTS, CONFIG, LATEST

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
STATE = "state.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint's content."""

    step: int
    """Optimizer steps done."""
    tensors: dict[str, dict[str, Tensor]]
    """By file: "model", "tower", "ema", "optimizer"; each a name -> tensor map on the CPU."""
    state: dict[str, Any]


def save(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint after `step` steps and move `latest` to it; older ones beyond `keep` are removed.

    Raises:
        OSError: the disk failed or is full; what was there before is untouched.
    """
    folder = run / CHECKPOINTS / f"step-{step:08d}"
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in tensors.items():
        save_file({k: v.detach().cpu().contiguous() for k, v in content.items()}, temporary / f"{name}.safetensors")
    shutil.copyfile(run / CONFIG, temporary / CONFIG)
    (temporary / STATE).write_text(json.dumps({"step": step, **state}))
    hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps(hashes, indent=2))
    (temporary / COMPLETE).write_text("")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    _point_latest(run, folder)
    for old in complete(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in (run / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted((p for p in folders if (p / COMPLETE).exists()), key=lambda p: int(p.name.removeprefix("step-")))


def load_newest(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint of a run that is whole, and a message for every newer one that was damaged."""
    messages: list[str] = []
    for folder in reversed(complete(run)):
        try:
            return load(folder), messages
        except UserError as error:
            messages.append(f"{error}; going back to the checkpoint before it")
    return None, messages


def load(folder: Path, *, names: tuple[str, ...] | None = None) -> Saved:
    """Read a checkpoint and check it against its hashes.

    Args:
        folder: a step-N folder.
        names: files to read, all unless given.

    Raises:
        UserError: not a checkpoint, or a file that is missing or damaged (by name).
    """
    if not (folder / COMPLETE).exists() or not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is not a complete checkpoint (no {COMPLETE} or {MANIFEST})")
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise UserError(f"{folder / MANIFEST} is damaged") from None
    wanted = [n for n in hashes if names is None or n.removesuffix(".safetensors") in names or n.endswith(".json")]
    for name in wanted:
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing")
        if _sha256(path) != hashes[name]:
            raise UserError(f"checkpoint file {path} is damaged (its SHA-256 differs from the manifest)")
    try:
        tensors = {n.removesuffix(".safetensors"): load_file(folder / n) for n in wanted if n.endswith(".safetensors")}
        state = json.loads((folder / STATE).read_text())
        return Saved(step=int(state["step"]), tensors=tensors, state=state)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from None


def _point_latest(run: Path, folder: Path) -> None:
    """`latest` is a text file with the name of a checkpoint; replaced in one operation."""
    temporary = run / f"{LATEST}.tmp"
    temporary.write_text(f"{CHECKPOINTS}/{folder.name}\n")
    os.replace(temporary, run / LATEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
