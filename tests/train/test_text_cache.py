"""The cache of text embeddings: what is written, read back, refused; and that training cannot tell it from encoding."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prx_model.packed_text import PackedText
from prx_model.text import T5GemmaTower
from tests.model.tiny_t5gemma import save_t5gemma
from train.build import build, check
from train.commandline import DryRun, parse, precompute_command
from train.data import text_cache
from train.data.index import open_images
from train.data.loader import Batch, open_dataset
from train.data.readers import ImageDataset
from train.data.text_cache import CachedText, CacheIndex, Encoding, ShardWriter, cache_bytes, dequantise, quantise
from train.loop import Trainer
from train.parallel import World
from train.plan import print_plan, text_cache_line
from train.precompute_text import precompute
from train.recipes import Recipe, prx_512
from train.trained import load_trained

from .commands import ROOT, TINY, run_program
from .picture_files import sentence, write_folder, write_parquet

WIDTH, ROWS = 32, 30
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
CAPTIONS = ["", *(f"Grey picture number {n} {'and more ' * (n % 9)}." for n in range(ROWS)), "a circle", "a square"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5gemma")
    save_t5gemma(folder, WIDTH)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty training pictures with one or two captions, some prefixed, and two validation pictures."""
    folder = tmp_path_factory.mktemp("data")
    captions = CAPTIONS[1 : ROWS + 1]
    long = [f"the {n}th one" if n % 3 == 0 else None for n in range(ROWS)]
    styles = ["icon" if n % 2 else "photo" for n in range(ROWS)]
    write_parquet(folder / "train.parquet", ROWS, caption=captions, long=long, source=styles, row_group_size=7)
    write_parquet(folder / "val.parquet", 2, caption=CAPTIONS[-2:], long=[None, " "], source=["photo", "photo"])
    return folder


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


@pytest.fixture(scope="module")
def recipe(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose cache has been written, in shards of 100 tokens and more."""
    made = make_recipe(encoder, data, tmp_path_factory.mktemp("cached") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.precompute_text.CHUNK", 4)
        assert "encoded 43 captions" in precompute(made, ALONE, shard_tokens=100)
    assert len(shards(made.text.cache)) > 3
    return made


def cached(recipe: Recipe) -> CachedText:
    tower = build(recipe, CPU).tower
    assert isinstance(tower, CachedText)
    return tower


def tower(encoder: Path) -> T5GemmaTower:
    return T5GemmaTower(str(encoder), max_tokens=48)


def shards(cache: Path | str) -> list[Path]:
    return sorted(Path(cache).glob("shard-*"))


def test_the_command_that_adds_captions_is_read_back_as_the_same_data_and_text(encoder: Path, data: Path) -> None:
    for extra in ([], ["--data.no-buckets", "--data.fast-jpeg", "--data.size-columns", "w", "h"]):
        made = make_recipe(encoder, data, data.parent / "cache", *extra)
        again = parse(shlex.split(precompute_command(made))[2:]).recipe
        assert isinstance(again, Recipe)
        assert (again.data, again.text) == (made.data, made.text)


# --- what is encoded ----------------------------------------------------------------------------------------------


def test_every_caption_that_training_may_draw_is_there_and_none_twice(recipe: Recipe) -> None:
    """30 captions, 10 of a second column, 2 of the validation split and the empty prompt."""
    index = CacheIndex(Path(recipe.text.cache), Encoding.of(recipe.text))
    assert len(index) == ROWS + 10 + 2 + 1
    dataset, source = open_dataset(recipe.data, recipe.train.seed, 4), cached(recipe)
    drawn = {dataset[position].caption for position in range(4 * ROWS)}
    assert "flat icon of the 3th one" in drawn
    _, lengths = source.encode([*drawn, "", "a circle", "a square"])
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
    monkeypatch.setattr("train.build.frozen_tower", lambda _: pytest.fail("there is nothing to encode"))
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


def all_captions(recipe: Recipe) -> Iterator[str]:
    dataset = open_dataset(recipe.data, 0, 4)
    assert isinstance(dataset, ImageDataset)
    yield from ("", "a circle", "a square", *dataset.captions())


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


def test_two_processes_of_torchrun_write_one_cache(encoder: Path, data: Path, recipe: Recipe, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "train/precompute_text.py"), *words(encoder, data, tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split("encoded ")[1].split()[0]) for line in done.stdout.splitlines() if "encoded" in line]
    assert len(counts) == 2
    assert sum(counts) == 43
    written = replace(recipe, text=replace(recipe.text, cache=str(tmp_path / "cache")))
    texts = list(dict.fromkeys(all_captions(recipe)))
    assert torch.equal(cached(written).encode(texts)[0], cached(recipe).encode(texts)[0])


# --- training from it ---------------------------------------------------------------------------------------------


def test_cached_embeddings_are_those_of_encoding_online_bit_for_bit(recipe: Recipe, encoder: Path) -> None:
    texts = list(dict.fromkeys(all_captions(recipe)))
    source, online = cached(recipe), tower(encoder)
    for seed in range(4):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = [texts[i] for i in order[:7]] + ["", texts[order[0]]]
        (stored, lengths), (encoded, online_lengths) = source.encode(batch), online.encode(batch)
        assert lengths == online_lengths
        assert stored.dtype == encoded.dtype == torch.bfloat16
        assert torch.equal(stored, encoded)


def test_loss_and_gradients_are_those_of_encoding_online_bit_for_bit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cache in (recipe.text.cache, ""):
        made = replace(
            recipe,
            text=replace(recipe.text, cache=cache),
            output=replace(recipe.output, folder=str(tmp_path / ("cached" if cache else "online"))),
            flow=replace(recipe.flow, caption_drop=0.4),
        )
        trainer = Trainer(made, ALONE)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the head is zero at the start: text would not reach the loss
            for _, parameter in trainer.parameters:
                parameter.normal_(std=0.1, generator=generator)
        if cache:
            assert isinstance(trainer.modules.tower, CachedText)
            monkeypatch.setattr(T5GemmaTower, "forward", lambda *_: pytest.fail("the encoder was used"))
        image = torch.randint(0, 256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
        positions = torch.arange(8)
        loss, _ = trainer._loss(Batch(image, list(all_captions(recipe))[:8], positions, positions))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in trainer.parameters}))
        monkeypatch.undo()
    (loss, gradients), (online_loss, online_gradients) = results
    assert torch.equal(loss, online_loss)
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, online_gradients[name]), name
    text_gradient = gradients["model.txt_in.weight"]
    assert text_gradient is not None
    assert text_gradient.norm() > 0


def test_a_run_from_the_cache_evaluates_and_draws_and_its_model_any_prompt(recipe: Recipe, tmp_path: Path) -> None:
    small = replace(
        recipe,
        output=replace(recipe.output, folder=str(tmp_path)),
        evaluation=replace(recipe.evaluation, grid=2),
        sampling=replace(recipe.sampling, steps=2),
    )
    outcome = Trainer(small, ALONE).run()
    assert outcome.finished
    assert outcome.grid is not None
    size = f"{small.data.height}x{small.data.width}"
    assert outcome.scores[f"ema/loss/{size}"] > 0
    # A prompt of one's own is in no cache: the encoder is loaded to draw it.
    modules = load_trained(outcome.folder, CPU).modules
    assert isinstance(modules.tower, T5GemmaTower)
    assert modules.encode(["a prompt nobody cached"])[0].shape[2] == WIDTH


# --- storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("storage", "measured"), [("fp8", 0.9995), ("int8", 0.9999)])
def test_quantised_tokens_keep_their_direction(storage: text_cache.Storage, measured: float) -> None:
    """At the encoder's width, normal features: the least cosine of 500 tokens, and of the whole."""
    tokens = torch.randn(500, 2304, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 500)[:, None]
    tokens = tokens.to(torch.bfloat16)
    stored, scale = quantise(tokens, storage)
    assert stored.element_size() == 1
    back = dequantise(stored, scale)
    assert back.dtype == torch.bfloat16
    cosine = F.cosine_similarity(back.double(), tokens.double())
    assert measured < float(cosine.min()) < 1
    assert float((back.double().norm(dim=1) / tokens.double().norm(dim=1) - 1).abs().max()) < 0.01


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_token_of_zeros_stays_zero(storage: text_cache.Storage) -> None:
    assert torch.equal(dequantise(*quantise(torch.zeros(2, 8), storage)), torch.zeros(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_cache_of_half_the_size_changes_the_loss_little(
    recipe: Recipe, encoder: Path, data: Path, tmp_path: Path, storage: str
) -> None:
    small = make_recipe(encoder, data, tmp_path / "cache", "--text.storage", storage)
    precompute(small, ALONE, shard_tokens=100)
    texts = list(dict.fromkeys(all_captions(recipe)))
    (exact, _), (rounded, _) = cached(recipe).encode(texts), cached(small).encode(texts)
    assert F.cosine_similarity(exact.float(), rounded.float()).min() >= 0.999
    assert not torch.equal(exact, rounded)
    losses = [loss_of(made, texts[:12]) for made in (recipe, small)]
    # A relative error of at most sqrt(2·(1 - 0.999)) = 4.5 % a token, and text is part of what the loss depends on.
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def loss_of(recipe: Recipe, captions: list[str]) -> float:
    modules = build(recipe, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in modules.model.parameters():
            parameter.normal_(std=0.1, generator=generator)
        image = torch.randn(len(captions), 3, 8, 8, generator=generator)
        text = modules.text(captions)
        assert isinstance(text, PackedText)
        out = modules.model(image, torch.rand(len(captions), generator=generator), text)
        return float((out - image).square().mean())


def test_features_that_a_format_cannot_hold_are_refused_with_one_that_can(tmp_path: Path) -> None:
    """One feature 300 times the others: int8's step is more than they are."""
    tokens = torch.randn(4, 2304, generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = 300.0
    writer = ShardWriter(tmp_path, Encoding("t", "", 8, "int8"), 0)
    message = sentence(lambda: writer.add(["a"], tokens.to(torch.bfloat16), [4]))
    assert message.startswith("text.storage 'int8' changes a token to a cosine of 0.99")
    assert message.endswith("take --text.storage bf16 or fp8")
    ShardWriter(tmp_path, Encoding("t", "", 8, "fp8"), 0).add(["a"], tokens.to(torch.bfloat16), [4])


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def copied(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The recipe with a cache of its own, to be damaged."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for file in Path(recipe.text.cache).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return replace(recipe, text=replace(recipe.text, cache=str(folder)))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "no header", "index flipped", "tokens flipped"])
def test_a_damaged_shard_is_named_and_written_again_once_removed(copied: Recipe, damage: str) -> None:
    victim = shards(copied.text.cache)[1]
    content = bytearray(victim.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    layout = json.loads(bytes(content[8:header]))
    if damage == "truncated":
        content = content[:-9]
    elif damage == "emptied":
        content = bytearray()
    elif damage == "no header":
        content[:8] = b"\xff" * 8
    else:
        content[header + layout["tokens" if damage == "tokens flipped" else "keys"]["data_offsets"][0] + 3] ^= 1
    victim.write_bytes(content)
    texts = list(dict.fromkeys(all_captions(copied)))
    message = sentence(lambda: cached(copied).encode(texts))
    assert message.startswith(f"the shard {victim} is damaged (")
    assert message.endswith("remove it and run train/precompute_text.py again")
    victim.unlink()
    assert sentence(lambda: cached(copied)).startswith(f"the shard {victim} is missing")
    assert "encoded 0 captions" not in precompute(copied, ALONE, shard_tokens=100)
    cached(copied).encode(texts)


def test_a_missing_caption_comes_with_the_command_that_adds_it(copied: Recipe, encoder: Path) -> None:
    message = sentence(lambda: cached(copied).encode(["a circle", "never seen " * 20]))
    start, command = message.split("; add it with: ")
    assert start.startswith(f"the text cache {copied.text.cache} lacks the caption 'never seen never seen")
    assert len(start) < 200 + len(copied.text.cache)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "train/precompute_text.py")
    parsed = parse(arguments).recipe
    assert isinstance(parsed, Recipe)
    assert (parsed.data, parsed.text) == (copied.data, copied.text)


def test_an_empty_folder_comes_with_the_command_that_fills_it(encoder: Path, data: Path, tmp_path: Path) -> None:
    made = make_recipe(encoder, data, tmp_path / "nothing")
    assert sentence(lambda: cached(made)) == (
        f"there is no text cache at {tmp_path / 'nothing'}; make it with: {precompute_command(made)}"
    )


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("name", "other", "name "),
        ("revision", "v2", "revision '' -> 'v2'"),
        ("max_tokens", 64, "max_tokens 48 -> 64"),
        ("storage", "fp8", "storage 'bf16' -> 'fp8'"),
    ],
)
def test_embeddings_of_other_settings_are_refused(recipe: Recipe, field: str, value: object, shown: str) -> None:
    other = replace(recipe, text=replace(recipe.text, **{field: value}))  # type: ignore[arg-type]
    for start in (lambda: cached(other), lambda: precompute(other, ALONE)):
        message = sentence(start)
        assert shown in message
        assert message.endswith("give --text.cache another one")


def test_a_list_of_shards_that_is_none_is_named(recipe: Recipe, tmp_path: Path) -> None:
    manifest = tmp_path / "writer-00000.json"
    manifest.write_text("[]")
    message = sentence(lambda: CacheIndex(tmp_path, Encoding.of(recipe.text)))
    assert message == f"{manifest} is no list of shards; remove it and run train/precompute_text.py again"


def test_a_cache_is_safetensors_and_json_only(recipe: Recipe) -> None:
    assert {file.suffix for file in Path(recipe.text.cache).iterdir()} == {".safetensors", ".json"}


def test_keys_depend_on_everything_that_an_embedding_depends_on() -> None:
    base = Encoding("name", "revision", 256, "bf16")
    changes = [{"name": "n"}, {"revision": "r"}, {"max_tokens": 128}, {"storage": "fp8"}]
    keys = {base.key("a"), base.key("b"), *(replace(base, **change).key("a") for change in changes)}  # type: ignore[arg-type]
    assert len(keys) == 6
    assert {len(key) for key in keys} == {16}
    assert base.key("a") == Encoding("name", "revision", 256, "bf16").key("a")


def test_settings_without_meaning_are_refused(recipe: Recipe) -> None:
    stored = replace(recipe, text=replace(recipe.text, cache="", storage="int8"))
    assert sentence(lambda: check(stored)).startswith("text.storage 'int8' is how a cache holds embeddings")
    trained = replace(recipe, text=replace(recipe.text, kind="bytes"))
    assert sentence(lambda: check(trained)).startswith("text.cache and text.revision are T5Gemma's")
    assert sentence(lambda: precompute(trained, ALONE)).startswith("precompute_text.py encodes the captions")


def test_the_program_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    done = run_program("precompute_text", "prx-512", "--text.cache", cache, "--data.path", str(tmp_path / "no"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: there is nothing at {tmp_path / 'no'}; give a folder")
    assert done.stderr.count("\n") == 1


# --- sizes --------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """RECIPE.md: 8.7 M captions are 4.0 TB in bf16 at 100 tokens, 10.3 TB padded to 256; half of it in one byte."""
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


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_embeddings_do_not_depend_on_the_batch_on_a_gpu(encoder: Path) -> None:
    """What equality of cache and online encoding rests on: products of fixed shapes treat their rows alike."""
    online = tower(encoder).cuda()
    texts = [text for text in CAPTIONS if text]
    together = dict(zip(texts, (part.clone() for part in split(online, texts)), strict=True))
    for seed in range(8):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = [texts[i] for i in order[: 1 + 2 * seed]]
        for text, part in zip(batch, split(online, batch), strict=True):
            assert torch.equal(part, together[text])


def split(online: T5GemmaTower, texts: list[str]) -> tuple[Tensor, ...]:
    tokens, lengths = online.encode(texts)
    return tokens.split(lengths)
