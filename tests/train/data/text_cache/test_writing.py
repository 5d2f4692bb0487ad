"""What precompute_text.py writes: every caption once, in whole shards, by any number of ranks; and how large."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prx_model.captions import clean_caption
from train.commandline import DryRun, parse, precompute_command
from train.data.index import open_images
from train.data.loader import open_dataset
from train.data.readers import ImageDataset
from train.data.text_cache import CacheIndex, Encoding, cache_bytes
from train.precompute_text import precompute
from train.ranks.parallel import World
from train.recipes import Recipe, prx_512
from train.run.plan import print_plan, text_cache_line

from ...commands import ROOT
from ..picture_files import sentence, write_folder, write_parquet
from .caches import ALONE, CPU, ROWS, WIDTH, all_captions, cached, make_recipe, shards, words


def test_the_command_that_adds_captions_is_read_back_as_the_same_data_and_text(encoder: Path, data: Path) -> None:
    for extra in ([], ["--data.no-buckets", "--data.fast-jpeg", "--data.size-columns", "w", "h"]):
        made = make_recipe(encoder, data, data.parent / "cache", *extra)
        again = parse(shlex.split(precompute_command(made))[2:]).recipe
        assert isinstance(again, Recipe)
        assert (again.data, again.text) == (made.data, made.text)


def test_every_caption_that_training_may_draw_is_there_and_none_twice(recipe: Recipe) -> None:
    """30 captions, 10 of a second column, 2 of the validation split and the empty prompt."""
    index = CacheIndex(Path(recipe.text.cache), Encoding.of(recipe.text))
    assert len(index) == ROWS + 10 + 2 + 1
    dataset, source = open_dataset(recipe.data, recipe.train.seed, 4), cached(recipe)
    drawn = {dataset[position].caption for position in range(4 * ROWS)}
    assert "flat icon of the 3th one" in drawn
    _, lengths = source.encode([*map(clean_caption, drawn), "", "a circle", "a square"])
    assert min(lengths) == 1
    assert max(lengths) > 32
    assert index.tokens * WIDTH * 2 == sum(f.stat().st_size for f in shards(recipe.text.cache)) - overhead(recipe)


def overhead(recipe: Recipe) -> int:
    """Bytes of the shards that are not embeddings: less than 2 kB a shard."""
    from safetensors import safe_open

    rest = 0
    for file in shards(recipe.text.cache):
        with safe_open(file, framework="pt") as opened:
            tokens = opened.get_slice("tokens").get_shape()
            assert tokens[0] >= 1
        rest += file.stat().st_size - 2 * tokens[0] * tokens[1]
    assert rest < 2000 * len(shards(recipe.text.cache))
    return rest


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_captions_are_those_of_the_split_s_rows_and_no_picture_is_read(tmp_path: Path, kind: str, split: str) -> None:
    """Rows of both splits mixed, over several row groups; half of the pictures cannot be read."""
    splits = ["val" if n % 3 == 1 else "train" for n in range(10)]
    if kind == "parquet":
        pictures = [b"no picture" if n % 2 else None for n in range(10)]
        write_parquet(tmp_path / "all.parquet", 10, image=pictures, split=splits, row_group_size=4)
    else:
        lines = [{"file_name": f"{n}.png", "caption": f"grey {n}", "split": splits[n]} for n in range(10)]
        write_folder(tmp_path, lines)
    index = open_images(tmp_path, split=split)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    dataset = ImageDataset(index, height=8, width=8, seed=0, flip=0.5)
    assert list(dataset.captions()) == [f"grey {n}" for n in range(10) if splits[n] == split]


def test_the_same_command_again_encodes_nothing_and_loads_no_encoder(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [(f.name, f.stat().st_mtime_ns) for f in shards(recipe.text.cache)]
    monkeypatch.setattr("train.learner.build.frozen_tower", lambda _: pytest.fail("there is nothing to encode"))
    assert "encoded 0 captions" in precompute(recipe, ALONE, shard_tokens=100)
    assert [(f.name, f.stat().st_mtime_ns) for f in shards(recipe.text.cache)] == before


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_run_goes_on_behind_its_last_whole_shard(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr("train.precompute_text.CHUNK", 4)
    interrupted = replace(recipe, text=replace(recipe.text, cache=str(tmp_path / "cache")))
    real, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        if len([name for name in calls if name.startswith("shard")]) > stop_after:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        precompute(interrupted, ALONE, shard_tokens=100)
    monkeypatch.setattr(os, "replace", real)
    first = {f.name: f.read_bytes() for f in shards(interrupted.text.cache)}
    assert len(first) == stop_after
    done = len(CacheIndex(tmp_path / "cache", Encoding.of(recipe.text)))
    assert f"encoded {43 - done} captions" in precompute(interrupted, ALONE, shard_tokens=100)
    assert all((tmp_path / "cache" / name).read_bytes() == content for name, content in first.items())
    texts = list(dict.fromkeys(all_captions(recipe)))
    assert torch.equal(cached(interrupted).encode(texts)[0], cached(recipe).encode(texts)[0])
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_ranks_share_the_captions_and_another_number_of_ranks_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    shared = replace(recipe, text=replace(recipe.text, cache=str(tmp_path / "cache")))
    counts = []
    for rank in (0, 1):  # rank 2 of 3 was never started
        said = precompute(shared, World(rank, 3, CPU), shard_tokens=100)
        counts.append(int(said.split("encoded ")[1].split()[0]))
    assert all(5 <= count <= 25 for count in counts)
    assert f"encoded {43 - sum(counts)} captions" in precompute(shared, World(0, 1, CPU))
    texts = list(dict.fromkeys(all_captions(recipe)))
    assert torch.equal(cached(shared).encode(texts)[0], cached(recipe).encode(texts)[0])


def test_a_shard_lost_since_more_ranks_wrote_is_written_again(recipe: Recipe, tmp_path: Path) -> None:
    """The list of a rank that is no longer started does not ask for it for ever."""
    shared = replace(recipe, text=replace(recipe.text, cache=str(tmp_path / "cache")))
    for rank in range(3):
        precompute(shared, World(rank, 3, CPU), shard_tokens=100)
    listed = json.loads((tmp_path / "cache/writer-00002.json").read_text())["shards"]
    (tmp_path / "cache" / next(iter(listed))).unlink()
    assert sentence(lambda: cached(shared)).endswith("copy it back, or run train/precompute_text.py again")
    said = [precompute(shared, World(rank, 2, CPU)) for rank in range(2)]
    assert 1 <= sum(int(line.split("encoded ")[1].split()[0]) for line in said) < 43
    texts = list(dict.fromkeys(all_captions(recipe)))
    assert torch.equal(cached(shared).encode(texts)[0], cached(recipe).encode(texts)[0])


def test_two_commands_at_a_time_do_not_write_over_one_another(recipe: Recipe, tmp_path: Path) -> None:
    """The second is refused while the first lives, and goes on where it was killed."""
    folder, encoding = tmp_path / "cache", Encoding.of(recipe.text)
    second = replace(recipe, text=replace(recipe.text, cache=str(folder)))
    program = (
        "import sys, time; from pathlib import Path; from train.data.text_cache import *\n"
        f"writer = ShardWriter(Path({str(folder)!r}), Encoding(*{tuple(vars(encoding).values())!r}), 0)\n"
        "print('holds', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "holds\n"
            message = sentence(lambda: precompute(second, ALONE))
            assert message.startswith(f"another process holds {folder / 'writer-00000.lock'}; wait for it")
            assert not shards(folder)
        finally:
            first.kill()
    assert "encoded 43 captions" in precompute(second, ALONE)


def test_two_processes_of_torchrun_write_one_cache(encoder: Path, data: Path, recipe: Recipe, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train/precompute_text.py"), *words(encoder, data, tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in re.findall(r"encoded (\d+) captions", done.stdout)]
    assert len(counts) == 2
    assert sum(counts) == 43
    written = replace(recipe, text=replace(recipe.text, cache=str(tmp_path / "cache")))
    texts = list(dict.fromkeys(all_captions(recipe)))
    assert torch.equal(cached(written).encode(texts)[0], cached(recipe).encode(texts)[0])


# --- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/recipe.md: 8.7 M captions are 4.0 TB in bf16 at 100 tokens, 10.3 TB padded to 256; half in one byte."""
    assert cache_bytes(8_700_000, 2304, "bf16") == pytest.approx(4.0e12, rel=0.005)
    assert cache_bytes(8_700_000, 2304, "bf16", 256) == pytest.approx(10.3e12, rel=0.005)
    for storage in ("fp8", "int8"):
        assert cache_bytes(8_700_000, 2304, storage) == pytest.approx(2.0e12, rel=0.01)
    print_plan(prx_512(), DryRun())
    printed = capsys.readouterr().out
    assert "text cache: 8,700,000 captions" in printed
    assert "at 100 tokens each, assumed, of width 2304 in bf16: 4.0 TB (10.3 TB padded to 256)" in printed


def test_the_plan_counts_the_captions_that_are_there(recipe: Recipe) -> None:
    line = text_cache_line(recipe)
    assert line.startswith(f"text cache: 64 captions (those of {recipe.data.path}) at 100 tokens each, assumed")
    assert line.endswith("of width 32 in bf16: 409.6 kB (196.6 kB padded to 48)")  # 64 x 100 x 32 x 2 bytes
