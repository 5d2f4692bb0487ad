"""The recipe's data, made small in their layouts: prepare.py, precompute_text.py, doctor.py, three steps of prx-512."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.model.test_text import saved  # noqa: F401  (a fixture: a tiny T5Gemma in a folder)
from tests.train.commands import run_program
from tests.train.data.picture_files import encoded

SHAPES = ((128, 128), (144, 96), (96, 144))


def pictures(count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        height, width = SHAPES[number % 3]
        blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        found.append(encoded(Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))), "JPEG"))
    return found


def write(file: Path, **columns: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=100)


def flux_generated(folder: Path) -> None:
    """Hugging Face's own picture cells, one caption."""
    cells = [{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(pictures(12, 1))]
    write(folder / "data/train-00000-of-00001.parquet", image=cells, caption_caption=[f"flux {n}" for n in range(12)])


def flux_reason(folder: Path) -> None:
    """Four folders of many columns, whose captions are partly null."""
    for number, name in enumerate(("Imagination", "Entity", "Style", "Text")):
        contents = pictures(3, 10 + number)
        captions = {
            "caption_original": [f"{name} {n}" for n in range(3)],
            "caption_detail": [None if n == number % 3 else f"{name} in detail {n}" for n in range(3)],
            "caption_reason": [None, "", f"{name} because {number}"],
        }
        more = {f"column_{n}": [float(n)] * 3 for n in range(30)}
        write(folder / name / "part-0.parquet", image=contents, **captions, **more, tags=[["a", "b"]] * 3)


def midjourney(folder: Path) -> None:
    """Raw bytes and two captions."""
    texts = {"llava": [f"llava {n}" for n in range(9)], "prompt": [f"prompt {n} --v 6" for n in range(9)]}
    write(folder / "train_000.parquet", image=pictures(9, 20), **texts)


def midjourney_recap(folder: Path) -> None:
    """Captions of several models, each with a status."""
    columns: dict[str, list[str | None]] = {}
    for name in ("gemini", "llava", "qwen3"):
        columns[name] = [f"{name} {n}" if n % 3 else None for n in range(9)]
        columns[f"{name}_status"] = ["ok" if n % 3 else "refused" for n in range(9)]
    write(folder / "train-0.parquet", image=pictures(9, 30), key=[f"mj-{n}" for n in range(9)], **columns)


CAPTIONS = {
    flux_generated: ["caption_caption"],
    flux_reason: ["caption_original", "caption_detail", "caption_reason"],
    midjourney: ["llava", "prompt"],
    midjourney_recap: ["gemini", "llava", "qwen3"],
}
TINY = {
    "model.hidden-size": "64", "model.num-heads": "2", "model.axes-dim": "16 16", "model.depth": "4",
    "model.bottleneck-size": "16", "text.max-tokens": "8", "routing.end": "2", "train.batch": "4", "train.steps": "3",
    "train.warmup": "1", "checkpoint.every": "3", "evaluation.every": "3", "evaluation.grid": "2",
    "evaluation.images": "2", "sampling.steps": "2", "data.workers": "0", "lpips.weights": "random",
    "pdino.weights": "random", "pdino.teacher": "vit_small_patch14_reg4_dinov2", "pdino.size": "28", "ema.every": "1",
    "repa.weights": "random", "repa.teacher": "vit_small_patch16_dinov3", "repa.layer": "1",
    "data.height": "96", "data.width": "96",
}  # fmt: skip


@pytest.mark.timeout(600)
def test_four_layouts_are_prepared_in_one_command_looked_at_and_trained_on(
    tmp_path: Path,
    saved: tuple[Path, torch.nn.Module],  # noqa: F811
) -> None:
    folders = [tmp_path / layout.__name__ for layout in CAPTIONS]
    for layout, folder in zip(CAPTIONS, folders, strict=True):
        layout(folder)
    names = list(dict.fromkeys(name for captions in CAPTIONS.values() for name in captions))
    out = tmp_path / "prepared"
    words = [*map(str, folders), "--out", str(out), "--sizes", "96", "--caption-columns", *names, "--workers", "1"]
    done = run_program("prepare", *words)
    assert done.returncode == 0, done.stderr
    size = json.loads((out / "manifest.json").read_text())["sizes"]["96"]
    assert (size["kept"], size["dropped"]) == (39, {"no caption": 3})
    rows = [row for file in sorted((out / "96").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    found = {name: [r["caption_column"] for r in rows if r["source"] == name] for name in (f.name for f in folders)}
    assert {name: len(listed) for name, listed in found.items()} == {
        "flux_generated": 12, "flux_reason": 12, "midjourney": 9, "midjourney_recap": 6,
    }  # fmt: skip
    assert all(sorted(listed) == ["gemini", "llava", "qwen3"] for listed in found["midjourney_recap"])
    assert {len(listed) for listed in found["flux_reason"]} == {1, 2, 3}

    text, encoder = saved
    cache = tmp_path / "cache"
    fields = TINY | {
        "data.path": str(out / "96"), "text.name": str(text), "text.cache": str(cache),
        "model.context-in-dim": str(encoder.config.encoder.hidden_size), "output.folder": str(tmp_path / "runs"),
    }  # fmt: skip
    recipe = ["prx-512", *(word for name, value in fields.items() for word in (f"--{name}", *value.split()))]
    encoded_text = run_program("precompute_text", *recipe)
    assert encoded_text.returncode == 0, encoded_text.stderr[-3000:]
    looked = run_program("doctor", *recipe, "--all", "--json")
    told = json.loads(looked.stdout)
    assert told["samples"] == 39, looked.stderr
    assert told["wrong"] == []
    assert told["captions"]["read"] == sum(len(row["caption"]) for row in rows)
    trained = run_program("speedrun", *recipe)
    assert trained.returncode == 0, trained.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "runs/prx-512/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses
    assert np.isfinite(losses).all()
    assert not (tmp_path / "runs/prx-512/quarantine").exists()


@pytest.mark.parametrize(
    ("layout", "condition", "kept"),
    [
        (midjourney_recap, "qwen3_status == 'ok' and gemini_status == 'ok'", 6),
        (flux_reason, "caption_detail is not None and column_3 > 2", 8),
        (midjourney, "'--v 6' in prompt and len(llava) < 7", 0),
        (flux_generated, "caption_caption != 'flux 3'", 11),
    ],
)
def test_each_layout_by_itself_with_its_own_condition(
    tmp_path: Path, layout: Callable[[Path], None], condition: str, kept: int
) -> None:
    layout(tmp_path / "raw")
    words = [str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--sizes", "64", "96", "--workers", "1"]
    done = run_program("prepare", *words, "--caption-columns", *CAPTIONS[layout], "--filter", condition)
    assert done.returncode == 0, done.stderr
    for size in json.loads((tmp_path / "out/manifest.json").read_text())["sizes"].values():
        assert size["kept"] == kept
        assert size["seen"] == size["kept"] + sum(size["dropped"].values())
