"""From a recipe's data section to batches on the device.

A batch knows its global sample positions: they are the ids from which noise, times and dropped captions are drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from train.data import scenes, shapes
from train.data.example import Dataset, Example
from train.data.index import NoSplitError, open_images
from train.data.readers import ImageDataset, parse_prefixes
from train.data.sampler import PositionSampler
from train.data.scenes import ScenesDataset
from train.data.shapes import ShapesDataset
from train.errors import UserError
from train.parallel import World
from train.randomness import derive_seed
from train.recipes import Data, Recipe

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

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on the device."""
        image, positions = (x.to(device, non_blocking=True) for x in (self.image, self.positions))
        return Batch(image, self.captions, positions, self.host_positions)

    def pin_memory(self) -> "Batch":
        """What the loader calls where batches go to a GPU: copies from pinned memory run beside computation."""
        return Batch(self.image.pin_memory(), self.captions, self.positions.pin_memory(), self.host_positions)


def open_dataset(data: Data, seed: int) -> Dataset:
    """The training set of a data section.

    Raises:
        UserError: no path, or nothing readable there.
    """
    seed = derive_seed(seed, purpose="data")
    if data.kind == "shapes":
        return ShapesDataset(seed, data.height, data.width)
    if data.kind == "scenes":
        return ScenesDataset(seed, data.height, data.width)
    return _images(data, seed, "train", shuffle=True)


class HeldOut(Dataset, Protocol):
    """Pictures with captions that are not trained on, in a fixed order."""

    def __len__(self) -> int: ...


def open_validation(data: Data) -> HeldOut | None:
    """The validation pictures in their order, without flips; None where the data have no such split.

    For shapes and scenes: pictures of the prompts held out as "combinations", the same for every run.
    """
    if data.kind != "images":
        seed = derive_seed(0, purpose="held-out pictures")
        if data.kind == "shapes":
            return _Drawn(ShapesDataset(seed, data.height, data.width, shapes.split_prompts().combinations))
        return _Drawn(ScenesDataset(seed, data.height, data.width, scenes.split_prompts().combinations))
    try:
        return _images(data, 0, "val", shuffle=False)
    except NoSplitError:
        return None


def fingerprint(dataset: Dataset) -> str:
    """What identifies the data of a run: a hash of files and rows, or the name of what is drawn."""
    return dataset.index.fingerprint if isinstance(dataset, ImageDataset) else type(dataset).__name__


def batches(
    dataset: Dataset, recipe: Recipe, world: World, start_step: int, first_position: int = 0
) -> Iterator[Batch]:
    """This rank's batches from `start_step` to the end of training, on its device; see `PositionSampler`.

    Raises:
        UserError: a picture or caption that cannot be read, by file and row.
    """
    sampler = PositionSampler(
        global_batch=recipe.train.batch,
        steps=recipe.train.steps,
        start_step=start_step,
        rank=world.rank,
        world=world.size,
        first_position=first_position,
    )
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
    )
    try:
        for batch in loader:
            yield batch.to(world.device)
    except UserError as error:
        # A worker's error arrives with its traceback as text; the sentence is the last line.
        sentence = str(error).strip().splitlines()[-1]
        raise UserError(sentence.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")) from None


def collate(examples: list[tuple[int, Example]]) -> Batch:
    """Stack numbered examples of one size."""
    image = torch.from_numpy(np.stack([example.image for _, example in examples])).permute(0, 3, 1, 2).contiguous()
    positions = torch.tensor([position for position, _ in examples], dtype=torch.int64)
    return Batch(image, [example.caption for _, example in examples], positions, positions)


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


def _images(data: Data, seed: int, split: str, *, shuffle: bool) -> ImageDataset:
    if not data.path:
        raise UserError("this preset reads pictures: give their folder with --data.path")
    index = open_images(data.path, image_column=data.image_column, caption_columns=data.caption_columns, split=split)
    return ImageDataset(
        index,
        height=data.height,
        width=data.width,
        seed=seed,
        caption_columns=data.caption_columns,
        style_column=data.style_column,
        style_prefixes=parse_prefixes(data.style_prefixes),
        flip=data.flip if shuffle else 0.0,
        shuffle=shuffle,
    )
