"""Storage of torch.distributed.checkpoint on safetensors files with a manifest: its planners share out and reshard.

torch has such a storage (`hf_storage`, in 2.11 already), which does not serve here: it numbers files instead of naming
sections, builds each file in memory a second time, takes a tensor's shape from the slices that it happens to find, and
hashes nothing.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from train.checkpoint import files
from train.checkpoint.files import Entry, Piece, Stored
from train.checkpoint.finite import NotFiniteError, is_finite


class HostPlanner(DefaultSavePlanner):
    """Plans by the live tensors (shapes, shards), writes their copies on the host."""

    def __init__(self, host: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.host = host

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.host[index.fqn]


class Writer(StorageWriter):
    """Writes one checkpoint; keys are "section/name". `finish`, on rank 0, is what makes it one."""

    def __init__(self, run: Path, rank: int, step: int, facts: dict[str, Any], keep: int) -> None:
        self.run, self.rank, self.step, self.facts, self.keep = run, rank, step, facts, keep
        self.folder = files.step_folder(run, step)
        self.temporary = self.folder.with_name(self.folder.name + files.TEMPORARY)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        files.begin(self.temporary)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        sections: dict[str, list[Piece]] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            place, whole = item.tensor_data.chunk, item.tensor_data.size
            if 0 in place.sizes and 0 not in whole:
                continue  # the empty shard of a rank that has no rows
            section, _, name = item.index.fqn.partition("/")
            data = planner.resolve_data(item)
            assert isinstance(data, Tensor)
            if not is_finite(data):
                raise NotFiniteError(f"{item.index.fqn} holds numbers that are not finite")
            sections.setdefault(section, []).append(Piece(name, data, tuple(place.offsets), tuple(whole)))
        results = []
        for section, pieces in sections.items():
            name = f"{section}.rank{self.rank:05d}.safetensors"
            entry = files.write_shard(self.temporary / name, pieces)
            results.append(WriteResult(MetadataIndex(name), entry.bytes, entry))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        entries: dict[str, Entry] = {r.index.fqn: r.storage_data for written in results for r in written}
        entries |= files.write_state(self.temporary, self.run, self.step, self.facts)
        files.write_manifest(self.temporary, entries)
        files.mark_complete(self.temporary)
        files.publish(self.temporary, self.folder)
        files.point_latest(self.run, self.folder)
        files.remove_old(self.run, self.folder, self.keep)

    def discard(self) -> None:
        """Remove what a failed save has written."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Reader(StorageReader):
    """Reads slices of a checkpoint whose files were checked before and whose index is known."""

    def __init__(self, folder: Path, index: dict[str, dict[str, Stored]]) -> None:
        self.folder = folder
        self.stored = {f"{section}/{name}": t for section, tensors in index.items() for name, t in tensors.items()}
        self.places = {
            MetadataIndex(name, torch.Size(c.offsets)): c.file for name, t in self.stored.items() for c in t.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=t.dtype),
                    torch.Size(t.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in t.chunks],
                )
                for name, t in self.stored.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.places[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for item in items:
                    name = item.storage_index.fqn.partition("/")[2]
                    slices = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(files.read_chunk(shard, name, slices))
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def load_planner() -> DefaultLoadPlanner:
    """Reshards into the given tensors; names are ours, already flat."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
