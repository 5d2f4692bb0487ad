"""A recipe with a tiny text encoder and a cache of its embeddings, for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import torch

from prx_model.captions import clean_caption
from prx_model.text import T5GemmaTower
from train.commandline import parse
from train.data.loader import open_dataset
from train.data.readers import ImageDataset
from train.data.text_cache import CachedText
from train.learner.build import build
from train.ranks.parallel import World
from train.recipes import Recipe

from ...commands import TINY

WIDTH, ROWS = 32, 30
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
CAPTIONS = ["", *(f"Grey picture number {n} {'and more ' * (n % 9)}." for n in range(ROWS)), "a circle", "a square"]


def words(encoder: Path, data: Path, cache: Path | str, *extra: str) -> list[str]:
    tiny = TINY[: TINY.index("--evaluation.prompts")]
    return [
        "prx-512", *tiny, "--model.patch-size", "4", "--data.height", "8", "--data.width", "8",
        "--data.path", str(data), "--data.workers", "0", "--data.caption-columns", "caption", "long",
        "--data.style-column", "source", "--data.style-prefixes", "icon=flat icon of",
        "--text.name", str(encoder), "--text.max-tokens", "48",
        "--text.cache", str(cache), "--repa.no-enabled", "--lpips.no-enabled", "--pdino.no-enabled",
        "--output.folder", str(Path(cache or data).parent / "runs"), "--train.steps", "3", *extra,
    ]  # fmt: skip


def make_recipe(encoder: Path, data: Path, cache: Path | str, *extra: str) -> Recipe:
    recipe = parse(words(encoder, data, cache, *extra)).recipe
    assert isinstance(recipe, Recipe)
    return recipe


def cached(recipe: Recipe) -> CachedText:
    tower = build(recipe, CPU).tower
    assert isinstance(tower, CachedText)
    return tower


def tower(encoder: Path) -> T5GemmaTower:
    return T5GemmaTower(str(encoder), max_tokens=48)


def shards(cache: Path | str) -> list[Path]:
    return sorted(Path(cache).glob("shard-*"))


def all_captions(recipe: Recipe) -> Iterator[str]:
    dataset = open_dataset(recipe.data, 0, 4)
    assert isinstance(dataset, ImageDataset)
    yield from ("", "a circle", "a square", *map(clean_caption, dataset.captions()))
