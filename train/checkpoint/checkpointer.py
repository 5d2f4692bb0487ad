"""Checkpoints of a run: saved in the background by all ranks, checked before they are read, loaded on any ranks.

A run's folder must lie where all nodes see it. On disk, a save goes: `step-N.tmp`, every file flushed → manifest with
SHA-256 → `COMPLETE` → renamed to step-N → `latest` moves → older ones go. The manifest and `COMPLETE` come before the
name, so that at no moment a folder called step-N is anything but whole; a kill leaves a `.tmp` that is never read.
"""

import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint import files, finite
from train.checkpoint.files import Entry, Stored, complete
from train.errors import UserError
from train.ranks.agreement import Group, gather, on_first
from train.run.lock import RunLock
from train.shown import tell

__all__ = ["Checkpointer", "Found", "Saved", "Tensors", "complete", "find_newest", "load", "load_into", "misfits"]

Tensors = dict[str, dict[str, Tensor]]
"""By section ("model", "tower", "repa", "ema", "optimizer") and name; plain tensors or DTensors."""

# torch says it at every save of a process alone, which is nothing to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Saved:
    """A checkpoint's content, read by one process."""

    step: int
    """Optimizer steps done."""
    tensors: Tensors
    """Whole tensors on the CPU."""
    state: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files were checked."""

    folder: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    entries: dict[str, Entry]

    def index(self) -> dict[str, dict[str, Stored]]:
        """Its tensors, by section and name."""
        return files.read_index(self.folder, [name for name in self.entries if files.section_of(name)])


class Checkpointer:
    """Saves a run's checkpoints; holds the run's folder against other jobs from its making to `close`.

    Args:
        run: the run's folder, with config.json by the first save.
        keep: newest complete checkpoints that stay.
        timeout: longest wait for another rank, in a save or an agreement.

    Raises:
        UserError: on every rank, where another job holds the folder.
    """

    def __init__(self, run: Path, *, keep: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        self.run, self.keep = run, keep
        alone = not dist.is_initialized()
        # A group of its own: the background's collectives must not mix with those of the training thread.
        self.group: Group = None if alone else cast(Group, dist.new_group(backend="gloo", timeout=timeout))
        self.rank = 0 if alone else dist.get_rank()
        self._lock: RunLock | None = None
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: tuple[str, bool] | None = None
        """Why the save under way failed, and whether it held numbers that are not finite."""
        self._failures = 0
        self._buffers: dict[str, Tensor] = {}
        on_first(self._open, self.group)

    def _open(self) -> None:
        self._lock = RunLock(self.run)
        files.remove_leftovers(self.run)

    def save(self, step: int, tensors: Tensors, facts: dict[str, Any], *, wait: bool = False) -> None:
        """Copy tensors to the host and write them in the background; collective, after the save before has ended.

        Replicas, of plain tensors or over a mesh's dimension, are written once. A CUDA tensor's copy is ordered in the
        current stream and not waited for; the tensor may be changed in that stream at once.

        Args:
            step: optimizer steps done.
            tensors: the same sections and names on every rank.
            facts: JSON values for state.json, taken from rank 0.
            wait: come back when it is on disk, as `finish` does.

        Raises:
            UserError: two saves in a row have failed, or this one with `wait`, or the one before held numbers that are
                not finite; what was saved before is untouched. Another failure alone is a warning.
        """
        self._settle(last=False)
        live = {f"{section}/{name}": t for section, content in tensors.items() for name, t in content.items()}
        copied = self._copy_to_host(live)
        self._step = step
        arguments = (live, dict(facts), copied)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until the save under way is on disk; collective.

        Raises:
            UserError: it has failed.
        """
        self._settle(last=True)

    def close(self) -> None:
        """Let the save under way end, and give the folder free; not collective, and nothing is raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _copy_to_host(self, live: dict[str, Tensor]) -> torch.cuda.Event | None:
        """Fill the host's buffers, which are kept from save to save; gives what to wait for before they are read."""
        on_gpu = False
        for name, tensor in live.items():
            whole: Any = tensor
            local = (whole.to_local() if hasattr(whole, "to_local") else whole).detach()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            on_gpu = on_gpu or local.is_cuda
        for name in self._buffers.keys() - live.keys():
            del self._buffers[name]
        if not on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _write(self, live: dict[str, Tensor], facts: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        """In the background. Ranks agree inside torch's `save`: what fails on one is raised on all."""
        # Here, and not at the top: torch.distributed.checkpoint takes seconds to import, sympy and all.
        from torch.distributed.checkpoint import state_dict_saver

        from train.checkpoint.storage import HostPlanner, Writer

        writer = Writer(self.run, self.rank, self._step, facts, self.keep)
        try:
            if copied is not None:
                copied.synchronize()
            planner, alone = HostPlanner(self._buffers), self.group is None
            state_dict_saver.save(live, storage_writer=writer, planner=planner, process_group=self.group, no_dist=alone)
            self._error = None
        except BaseException as error:  # torch's CheckpointException is one of these
            self._error = _reason(error)
            if self.rank == 0:
                writer.discard()
                tell(f"warning: {self._failed(self._error[0])}")

    def _settle(self, *, last: bool) -> None:
        """Wait for the save under way, and judge it with all ranks."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        try:
            reasons = [reason for reason in gather(self._error, self.group) if reason is not None]
        except RuntimeError as error:  # from gloo: a rank has ended, or its machine has
            said = str(error).partition("\n")[0]
            raise UserError(f"{self._failed('the other ranks no longer answer')} ({said})") from None
        if not reasons:
            self._failures = 0
            return
        self._failures += 1
        diverged = [reason for reason, not_finite in reasons if not_finite]
        if diverged:
            raise UserError(
                f"{self._failed(diverged[0])}: training has diverged; start again with lower learning rates "
                "(--muon.lr, --adam.lr), or --train.precision fp32"
            )
        if last or self._failures > 1:
            raise UserError(self._failed(reasons[0][0]))

    def _failed(self, reason: str) -> str:
        before = complete(self.run)
        left = f"the newest whole one is {before[-1]}" if before else "there is none yet"
        return f"the checkpoint after step {self._step} was not written: {reason}; {left}"


def find_newest(run: Path, group: Group = None) -> Found | None:
    """The newest checkpoint of a run that is whole, or none where none was ever saved; collective.

    Every rank hashes its share of the files; all come to the same answer. A damaged one is named in a warning, and the
    one before it is taken.

    Args:
        group: with a gloo backend (`Checkpointer.group`).

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for folder in on_first(lambda: files.step_folders(run)[::-1], group):
        found = _check(folder, group)
        if isinstance(found, Found):
            return found
        problems.append(found)
        if group is None or dist.get_rank(group) == 0:
            tell(f"warning: {found}; going back to the checkpoint before it")
    if problems:
        raise UserError(f"{run} has no whole checkpoint: {'; '.join(problems)}; start anew with --output.name")
    return None


def load_into(found: Found, tensors: Tensors, group: Group = None, *, dropped: Collection[str] = ()) -> None:
    """Read a checkpoint into tensors of any sharding, in place; collective.

    Args:
        tensors: what to fill, the same sections and names on every rank.
        dropped: modules that the checkpoint may have and `tensors` lack; their optimizer state stays unread too.

    Raises:
        UserError: names, shapes or dtypes differ; nothing was changed then.
    """
    index = found.index()
    odd = misfits(index, tensors, dropped)
    if odd:
        shown = "; ".join(odd[:4]) + (f"; and {len(odd) - 4} more" if len(odd) > 4 else "")
        raise UserError(f"the checkpoint {found.folder} does not fit this stage: {shown}")
    from torch.distributed.checkpoint import state_dict_loader

    from train.checkpoint.storage import Reader, load_planner

    flat = {f"{section}/{name}": t for section, content in tensors.items() for name, t in content.items()}
    with torch.no_grad():
        state_dict_loader.load(
            flat,
            storage_reader=Reader(found.folder, index),
            planner=load_planner(),
            process_group=group,
            no_dist=group is None,
        )


def misfits(index: dict[str, dict[str, Stored]], tensors: Tensors, dropped: Collection[str] = ()) -> list[str]:
    """What keeps a checkpoint from being read into tensors, a sentence each, shapes first; see `load_into`."""
    gone = set(dropped) - tensors.keys()
    shapes: list[str] = []
    odd = [f"it has no section {section!r}" for section in sorted(tensors.keys() - index.keys()) if tensors[section]]
    for section, stored in sorted(index.items()):
        if section not in tensors:
            odd += [] if section in gone else [f"its section {section!r} has no place here"]
            continue
        here = tensors[section]
        odd += [f"{section}/{name} is not in it" for name in sorted(here.keys() - stored.keys())]
        for name, there in sorted(stored.items()):
            if name not in here:
                odd += [] if name.split(".")[0] in gone else [f"its {section}/{name} has no place here"]
            elif (shape := tuple(here[name].shape)) != there.shape:
                shapes.append(f"{section}/{name} has shape {there.shape} in it, {shape} here")
            elif here[name].dtype != there.dtype:
                shapes.append(f"{section}/{name} is {there.dtype} in it, {here[name].dtype} here")
    return shapes + odd


def load(folder: Path, *, names: Collection[str] | None = None) -> Saved:
    """Check a checkpoint and read whole tensors of it, in one process.

    Args:
        folder: a step-N folder.
        names: sections to check and read, all unless given; those that it lacks are left out.

    Raises:
        UserError: not a checkpoint, or a file that is missing, damaged, not finite or no part of one (by name).
    """
    entries, state = files.read_manifest(folder)
    wanted = [n for n in entries if (section := files.section_of(n)) and (names is None or section in names)]
    for name in wanted:
        files.check_file(folder, name, entries[name])
    index = files.read_index(folder, wanted)
    tensors = {
        section: {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored.items()}
        for section, stored in index.items()
    }
    for file in wanted:
        section = str(files.section_of(file))
        with safe_open(folder / file, framework="pt") as shard:
            for name, stored in index[section].items():
                for chunk in stored.chunks:
                    if chunk.file == file:
                        here = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                        part = shard.get_tensor(name)
                        finite.check(folder / file, name, part)
                        tensors[section][name][here].copy_(part)
    return Saved(state["step"], tensors, state)


def _check(folder: Path, group: Group) -> Found | str:
    """Check a checkpoint together; gives it, or what is wrong with it."""

    def read() -> tuple[dict[str, Entry], dict[str, Any]] | str:
        try:
            return files.read_manifest(folder)
        except (UserError, OSError) as error:
            return str(error)

    listed = on_first(read, group)
    if isinstance(listed, str):
        return listed
    entries, state = listed
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    # Dealt out by size, so that every rank has about as much to hash.
    names = sorted((n for n in entries if files.section_of(n)), key=lambda n: (-entries[n].bytes, n))
    problem = None
    try:
        for name in names[rank::size]:
            files.check_file(folder, name, entries[name])
        if rank == 0:
            files.read_index(folder, names)
        for name in names[rank::size]:
            finite.check_file(folder / name)
    except (UserError, OSError, SafetensorError) as error:
        problem = str(error)
    problems = [p for p in gather(problem, group) if p is not None]
    return problems[0] if problems else Found(folder, state["step"], state, entries)


def _reason(error: BaseException) -> tuple[str, bool]:
    """The first rank's error, without its traceback, and whether it is of numbers that are not finite."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"{inner} (rank {rank})", isinstance(inner, finite.NotFiniteError)
    return f"{type(error).__name__}: {error}", False
