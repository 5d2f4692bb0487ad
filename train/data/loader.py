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

from train.data import buckets
from train.data.buckets import Merge, Size, bucket_sizes, describe, merge_small, too_few
from train.data.drawn import scenes, shapes
from train.data.drawn.scenes import ScenesDataset
from train.data.drawn.shapes import ShapesDataset
from train.data.example import Dataset, Example, Substituted
from train.data.formats.storage import Storage
from train.data.index import open_images
from train.data.kept_sizes import picture_sizes
from train.data.mixture import MixedIndex, Source, open_sources
from train.data.readers import ImageDataset, parse_prefixes
from train.data.rows import ImageIndex, NoSplitError
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
    sources: Tensor | None = None
    """(batch,) int64, which source of a mixture each is from; on the device."""
    keys: tuple[str, ...] = ()
    """Names each sample in messages, as it was read: no other order of the data can name another."""

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on the device."""
        image, positions = (x.to(device, non_blocking=True) for x in (self.image, self.positions))
        sources = None if self.sources is None else self.sources.to(device, non_blocking=True)
        return replace(self, image=image, positions=positions, sources=sources)

    def pin_memory(self) -> "Batch":
        """What the loader calls where batches go to a GPU: copies from pinned memory run beside computation."""
        sources = None if self.sources is None else self.sources.pin_memory()
        return replace(self, image=self.image.pin_memory(), positions=self.positions.pin_memory(), sources=sources)


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


def accounts(dataset: Dataset) -> list[str]:
    """Of each source a sentence: what it holds, and what of it became no sample; none of what is drawn."""
    if not isinstance(dataset, ImageDataset):
        return []
    index = dataset.index
    if not isinstance(index, MixedIndex):
        return [index.account.sentence()]
    return [f"{s.name}: {part.account.sentence()}" for s, part in zip(index.sources, index.parts, strict=True)]


def source_names(dataset: Dataset) -> tuple[str, ...]:
    """The sources of a mixture; empty for one source."""
    return dataset.mixed.names if isinstance(dataset, ImageDataset) and dataset.mixed else ()


def most_captions(dataset: ImageDataset) -> int:
    """How many captions there may be: one for each row and caption column."""
    index = dataset.index
    return index.captions() if isinstance(index, MixedIndex) else len(index) * len(dataset.caption_columns)


def bucket_counts(dataset: Dataset) -> dict[Size, int]:
    """Pictures of each aspect-ratio bucket, before small ones are merged; empty without buckets."""
    if not isinstance(dataset, ImageDataset) or not len(dataset.bucket_of):
        return {}
    return {size: sum(count) for size, count in buckets.bucket_counts(dataset.bucket_of, dataset.sizes).items()}


def merges_of(dataset: ImageDataset, batch: int) -> list[Merge]:
    """Which buckets are merged because a batch would show a picture twice.

    Raises:
        UserError: fewer samples than a step takes, or of one source than its share of a step.
    """
    if len(dataset) < batch:
        raise too_few(len(dataset), batch)
    if not len(dataset.bucket_of) and dataset.mixed is None:
        return []
    bucket_of = dataset.bucket_of if len(dataset.bucket_of) else np.zeros(len(dataset), np.int16)
    return merge_small(buckets.bucket_counts(bucket_of, dataset.sizes, dataset.mixed), batch, dataset.mixed)


def notes(dataset: Dataset, batch: int) -> tuple[str, ...]:
    """Sentences that a user should see once: files that are left out, and buckets that are merged.

    Raises:
        UserError: fewer samples than a step of `batch` over all ranks takes.
    """
    if not isinstance(dataset, ImageDataset):
        return ()
    merges = merges_of(dataset, batch)
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
            for tensor in (copied.image, copied.positions, copied.sources):
                if tensor is not None:
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
    named = [example.source for _, example in examples if example.source is not None]
    sources = torch.tensor(named, dtype=torch.int64) if named else None
    captions = [example.caption for _, example in examples]
    return Batch(image, captions, positions, positions, substituted, sources, keys)


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
    cache = Path(data.index_cache) if data.index_cache else None
    none: list[NoSplitError] = []

    def open_one(source: Source, mixed: bool) -> ImageIndex | None:
        try:
            return open_images(
                source.path,
                image_column=source.image_column,
                caption_columns=source.caption_columns,
                split=split,
                storage=Storage(data.timeout, data.tries),
                cache=cache,
                some_captions=mixed,
            )
        except NoSplitError as error:
            if split == "train" or not mixed:
                raise
            none.append(error)  # another source may have validation pictures
            return None

    index = open_sources(data, open_one)
    if index is None:
        raise none[0]
    return ImageDataset(
        index,
        height=data.height,
        width=data.width,
        seed=seed,
        caption_columns=index.caption_columns if isinstance(index, MixedIndex) else data.caption_columns,
        style_column=data.style_column,
        style_prefixes=parse_prefixes(data.style_prefixes),
        flip=data.flip if split == "train" else 0.0,
        shuffle=split == "train",
        buckets=bucket_sizes(data.height, data.width, patch) if data.buckets else (),
        fast_jpeg=data.fast_jpeg,
        fit=data.fit,
        pictures=picture_sizes(index, data.size_columns, cache) if data.buckets else None,
    )
