"""From a recipe's data section to batches on the device.

A batch knows its global sample positions: they are the ids from which noise, times and dropped captions are drawn.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from train.data.buckets import Size, bucket_sizes, describe, merge_small, too_few
from train.data.drawn import scenes, shapes
from train.data.drawn.scenes import ScenesDataset
from train.data.drawn.shapes import ShapesDataset
from train.data.example import Dataset, Example, Substituted
from train.data.formats.storage import Storage
from train.data.index import open_images
from train.data.kept_sizes import picture_sizes
from train.data.readers import ImageDataset, parse_prefixes
from train.data.rows import NoSplitError
from train.data.sampler import PositionSampler
from train.data.settings import Data
from train.data.worker_signals import born_shielded, end_by_parent_only
from train.errors import UserError
from train.randomness import derive_seed
from train.ranks.parallel import World
from train.recipes import Recipe

_DRAWN = 50_000
"""Held-out pictures of a set that is drawn on the fly: as many as published distances are measured with."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step's samples."""

    image: Tensor
    """(batch, 3, height, width) uint8."""
    captions: list[str]
    positions: Tensor
    """(batch,) int64, global sample positions."""
    host_positions: Tensor
    """The same, where the captions are: reading them from a GPU would wait for it."""
    substituted: tuple[Substituted, ...] = ()
    """Samples of this batch that could not be read, and in whose place others stand."""
    keys: tuple[str, ...] = ()
    """Names each sample in messages, as it was read: no other order of the data can name another."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on the device."""
        image, positions = (x.to(device, non_blocking=True) for x in (self.image, self.positions))
        return replace(self, image=image, positions=positions)

    def pin_memory(self) -> "Batch":
        """What the loader calls where batches go to a GPU: copies from pinned memory run beside computation."""
        return replace(self, image=self.image.pin_memory(), positions=self.positions.pin_memory())


def open_dataset(data: Data, seed: int, patch: int) -> Dataset:
    """The training set of a data section; sides of aspect-ratio buckets are multiples of `patch` pixels.

    Raises:
        UserError: no path, or nothing readable there.
    """
    seed = derive_seed(seed, purpose="data")
    if data.kind == "shapes":
        return ShapesDataset(seed, data.height, data.width)
    if data.kind == "scenes":
        return ScenesDataset(seed, data.height, data.width)
    return _images(data, seed, patch, "train")


class HeldOut(Dataset, Protocol):
    """Pictures with captions that are not trained on, in a fixed order."""

    def __len__(self) -> int: ...


def open_validation(data: Data, patch: int) -> HeldOut | None:
    """The validation pictures in their order, without flips; None where the data have no such split.

    For shapes and scenes: pictures of the prompts held out as "combinations", the same for every run.
    """
    if data.kind != "images":
        seed = derive_seed(0, purpose="held-out pictures")
        if data.kind == "shapes":
            return _Drawn(ShapesDataset(seed, data.height, data.width, shapes.split_prompts().combinations))
        return _Drawn(ScenesDataset(seed, data.height, data.width, scenes.split_prompts().combinations))
    try:
        return _images(data, 0, patch, "val")
    except NoSplitError:
        return None


def by_size(dataset: HeldOut, count: int) -> list[list[int]]:
    """The first `count` held-out pictures by their sizes: numbers in the data set, which rise, one list a size."""
    sizes: dict[Size, list[int]] = {}
    for number in range(min(count, len(dataset))):
        size = dataset.size_of(number) if isinstance(dataset, ImageDataset) else (0, 0)
        sizes.setdefault(size, []).append(number)
    return list(sizes.values())


def fingerprint(dataset: Dataset) -> str:
    """What identifies the data of a run: a hash of files, rows and buckets, or the name of what is drawn."""
    return dataset.fingerprint if isinstance(dataset, ImageDataset) else type(dataset).__name__


def bucket_counts(dataset: Dataset) -> dict[Size, int]:
    """Pictures of each aspect-ratio bucket, before small ones are merged; empty without buckets."""
    if not isinstance(dataset, ImageDataset) or not len(dataset.bucket_of):
        return {}
    counts = np.bincount(dataset.bucket_of, minlength=len(dataset.sizes)).tolist()
    return dict(zip(dataset.sizes, counts, strict=True))


def notes(dataset: Dataset, batch: int) -> tuple[str, ...]:
    """Sentences that a user should see once: files that are left out, and buckets that are merged.

    Raises:
        UserError: fewer samples than a step of `batch` over all ranks takes.
    """
    if not isinstance(dataset, ImageDataset):
        return ()
    if len(dataset) < batch:
        raise too_few(len(dataset), batch)
    counts = bucket_counts(dataset)
    merges = merge_small(counts, batch) if counts else []
    return (*dataset.index.problems, *([describe(merges, batch)] if merges else []))


def batches(
    dataset: Dataset, recipe: Recipe, world: World, start_step: int, first_position: int = 0
) -> Iterator[Batch]:
    """This rank's batches from `start_step` to the end of training, on its device; see `PositionSampler`.

    All pictures of a step have one size on all ranks. On a GPU the next batch is copied while the current one is
    computed with.

    Raises:
        UserError: fewer samples than a step takes; samples of which none can be read; storage that stays down.
    """
    size = recipe.train.batch
    sampler = PositionSampler(
        global_batch=size,
        steps=recipe.train.steps,
        start_step=start_step,
        rank=world.rank,
        world=world.size,
        first_position=first_position,
    )
    if isinstance(dataset, ImageDataset):
        if len(dataset) < size:
            raise too_few(len(dataset), size)
        dataset = dataset.planned(batch=size, first_position=first_position)
    workers = recipe.data.workers
    loader: DataLoader[Any] = DataLoader(
        _Numbered(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        # Workers start fresh: a fork would copy the process's threads' locks in whatever state they are.
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
        worker_init_fn=end_by_parent_only,
    )
    return _on_device(loader, world.device)


def _on_device(loader: "DataLoader[Any]", device: torch.device) -> Iterator[Batch]:
    try:
        with born_shielded() if loader.num_workers else nullcontext():
            loaded = iter(loader)
        if device.type != "cuda":
            for batch in loaded:
                yield batch.to(device)
            return
        # On a stream of its own a copy runs beside the kernels of the step before, which are still queued.
        aside = torch.cuda.Stream(device)
        for batch in loaded:
            with torch.cuda.stream(aside):
                copied = batch.to(device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(aside)
            for tensor in (copied.image, copied.positions):
                tensor.record_stream(current)  # else its memory could be given to the next copy too early
            yield copied
    except UserError as error:
        # A worker's error arrives with its traceback as text; the sentence is the last line.
        sentence = str(error).strip().splitlines()[-1]
        module = type(error).__module__
        raise UserError(sentence.removeprefix(f"{module}.{type(error).__qualname__}: ")) from None


def collate(examples: list[tuple[int, Example]]) -> Batch:
    """Stack numbered examples of one size."""
    image = torch.from_numpy(np.stack([example.image for _, example in examples])).permute(0, 3, 1, 2).contiguous()
    positions = torch.tensor([position for position, _ in examples], dtype=torch.int64)
    substituted = tuple(example.substituted for _, example in examples if example.substituted is not None)
    keys = tuple(example.key for _, example in examples)
    return Batch(image, [example.caption for _, example in examples], positions, positions, substituted, keys)


def to_float(image: Tensor) -> Tensor:
    """uint8 pictures to float32 in [-1, 1]."""
    return image.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(image: Tensor) -> Tensor:
    """Pictures in about [-1, 1] to uint8, clamped."""
    return image.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


class _Drawn:
    """The first examples of an endless data set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return _DRAWN

    def __getitem__(self, position: int) -> Example:
        return self.dataset[position]


class _Numbered(torch.utils.data.Dataset[tuple[int, Example]]):
    """A dataset whose items carry their position."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: int) -> tuple[int, Example]:
        return position, self.dataset[position]


def _images(data: Data, seed: int, patch: int, split: str) -> ImageDataset:
    if not data.path:
        raise UserError("this preset reads pictures: give their folder with --data.path")
    cache = Path(data.index_cache) if data.index_cache else None
    index = open_images(
        data.path,
        image_column=data.image_column,
        caption_columns=data.caption_columns,
        split=split,
        storage=Storage(data.timeout, data.tries),
        cache=cache,
    )
    return ImageDataset(
        index,
        height=data.height,
        width=data.width,
        seed=seed,
        caption_columns=data.caption_columns,
        style_column=data.style_column,
        style_prefixes=parse_prefixes(data.style_prefixes),
        flip=data.flip if split == "train" else 0.0,
        shuffle=split == "train",
        buckets=bucket_sizes(data.height, data.width, patch) if data.buckets else (),
        fast_jpeg=data.fast_jpeg,
        fit=data.fit,
        pictures=picture_sizes(index, data.size_columns, cache) if data.buckets else None,
    )
