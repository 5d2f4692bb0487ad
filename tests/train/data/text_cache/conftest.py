"""What the tests of this folder share: an encoder, captioned pictures, and a cache that nothing may write to."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.model.tiny_t5gemma import save_t5gemma
from train.precompute_text import precompute
from train.recipes import Recipe

from ..picture_files import write_parquet
from .caches import ALONE, CAPTIONS, ROWS, WIDTH, make_recipe, shards


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5gemma")
    save_t5gemma(folder, WIDTH)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty training pictures with one or two captions, some prefixed, and two validation pictures."""
    folder = tmp_path_factory.mktemp("data")
    captions = CAPTIONS[1 : ROWS + 1]
    long = [f"the {n}th one" if n % 3 == 0 else None for n in range(ROWS)]
    styles = ["icon" if n % 2 else "photo" for n in range(ROWS)]
    write_parquet(folder / "train.parquet", ROWS, caption=captions, long=long, source=styles, row_group_size=7)
    write_parquet(folder / "val.parquet", 2, caption=CAPTIONS[-2:], long=[None, " "], source=["photo", "photo"])
    return folder


@pytest.fixture(scope="session")
def recipe(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose cache has been written, in shards of 100 tokens and more."""
    made = make_recipe(encoder, data, tmp_path_factory.mktemp("cached") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.precompute_text.CHUNK", 4)
        assert "encoded 43 captions" in precompute(made, ALONE, shard_tokens=100)
    assert len(shards(made.text.cache)) > 3
    return made


@pytest.fixture
def copied(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The recipe with a cache of its own, to be damaged."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for file in Path(recipe.text.cache).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return replace(recipe, text=replace(recipe.text, cache=str(folder)))
