"""What a cache refuses: damage, other settings, what it lacks; each by a sentence that says what mends it."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.commandline import parse, precompute_command
from train.data import text_cache
from train.data.text_cache import CachedText, CacheIndex, Encoding, ShardWriter
from train.errors import UserError
from train.learner.build import check
from train.precompute_text import precompute
from train.recipes import Recipe

from ...commands import run_program
from ..picture_files import sentence
from .caches import ALONE, all_captions, cached, make_recipe, shards


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


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_flipped_bit_of_a_scale_is_found(tmp_path: Path, storage: text_cache.Storage) -> None:
    encoding = Encoding("t5", "", 8, storage)
    tokens = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    with ShardWriter(tmp_path, encoding, 0) as writer:
        writer.add(["a", "", "b"], tokens, [4, 0, 2])
        writer.flush()
    source = CachedText(tmp_path, encoding, torch.device("cpu"), "command")
    assert source.encode(["b", "", "a"])[1] == [2, 0, 4]
    (victim,) = shards(tmp_path)
    content = bytearray(victim.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + json.loads(bytes(content[8:header]))["scales"]["data_offsets"][0] + 17] ^= 1  # of token 4, "b"
    victim.write_bytes(content)
    source = CachedText(tmp_path, encoding, torch.device("cpu"), "command")
    source.encode(["a"])
    assert sentence(lambda: source.encode(["b"])) == (
        f"the shard {victim} is damaged (tokens 4 to 6 have another checksum); remove it and run "
        "train/precompute_text.py again"
    )


def test_a_full_disk_is_a_sentence_and_the_shard_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = Encoding("t5", "", 8, "bf16")
    with ShardWriter(tmp_path, encoding, 0) as writer:
        writer.add(["a"], torch.ones(2, 4), [2])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            message = sentence(writer.flush)
        assert message.startswith(f"a shard of 16 bytes could not be written to {tmp_path}: ")
        assert "No space left on device" in message
        assert len(CacheIndex(tmp_path, encoding)) == 0
        writer.flush()
    assert len(CacheIndex(tmp_path, encoding)) == 1


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


def test_a_refused_writer_lets_the_folder_go(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, Encoding("t5", "", 8, "bf16"), 0) as writer:
        writer.add(["a"], torch.ones(2, 4), [2])
        writer.flush()
    with pytest.raises(UserError, match="storage 'bf16' -> 'fp8'") as refusal:
        ShardWriter(tmp_path, Encoding("t5", "", 8, "fp8"), 0)
    with ShardWriter(tmp_path, Encoding("t5", "", 8, "bf16"), 0):  # while the traceback still holds the frames
        assert refusal.tb is not None


def test_a_list_of_shards_that_is_none_is_named(recipe: Recipe, tmp_path: Path) -> None:
    manifest = tmp_path / "writer-00000.json"
    manifest.write_text("[]")
    message = sentence(lambda: CacheIndex(tmp_path, Encoding.of(recipe.text)))
    assert message == f"{manifest} is no list of shards; remove it and run train/precompute_text.py again"


def test_a_cache_is_safetensors_and_json_only(recipe: Recipe) -> None:
    """Beside them, an empty file that a writer locks."""
    files = list(Path(recipe.text.cache).iterdir())
    assert {file.suffix for file in files if file.stat().st_size} == {".safetensors", ".json"}
    assert {file.name for file in files if not file.stat().st_size} == {"writer-00000.lock"}


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
