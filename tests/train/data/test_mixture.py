"""Several sources as one run: how often each comes, what its columns are, and that a resume sees the same."""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from train.commandline import parse, precompute_command
from train.data.buckets import BucketPlan, Mixed, Shares, merge_small
from train.data.loader import Batch, batches, notes, open_dataset
from train.data.mixture import sources_of
from train.data.rows import NoSplitError
from train.data.settings import Data
from train.ranks.parallel import World
from train.recipes import Recipe, prx_512

from ..commands import ROOT, TINY, run_program
from .picture_files import plain, sentence, write_folder, write_parquet, write_tar

CPU = torch.device("cpu")
SIZES = [(8, 16), (8, 8), (16, 8)]


# Order


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.01, 0.01, 0.98], [0.3, 0.0001, 0.6999]])
def test_draws_come_in_proportion_at_every_point_and_any_is_reached_at_once(shares: list[float]) -> None:
    series, seen = Shares(shares), [0] * len(shares)
    for draw in range(5000):
        assert [series.before(draw, stream) for stream in range(len(shares))] == seen
        stream, before = series.at(draw)
        assert before == seen[stream]
        assert series.draw_of(stream, before) == draw
        seen[stream] += 1
        assert all(abs(n - share * (draw + 1)) <= len(shares) for n, share in zip(seen, shares, strict=True))


def make_plan(counts: list[tuple[int, int]], shares: tuple[float, float], batch: int, first: int = 0) -> BucketPlan:
    """A bucket of SIZES for each pair, with so many rows of the first and second source."""
    rows = [(bucket, source) for bucket, pair in enumerate(counts) for source, n in enumerate(pair) for _ in range(n)]
    bucket_of, source_of = np.random.default_rng(1).permutation(np.array(rows, dtype=np.int16)).T
    mixed = Mixed(source_of.copy(), shares, ("first", "second"))
    return BucketPlan(bucket_of.copy(), SIZES[: len(counts)], batch=batch, seed=0, first_position=first, mixed=mixed)


@pytest.mark.parametrize(
    ("counts", "shares"),
    [
        ([(40, 40)], (0.5, 0.5)),
        ([(90, 9)], (0.6, 0.4)),
        ([(200, 12)], (0.3, 0.7)),
        ([(50, 30), (30, 20), (0, 40)], (0.5, 0.5)),
        ([(15, 11), (9, 30), (33, 14)], (0.4, 0.6)),
    ],
)
def test_each_source_has_epochs_of_its_own_its_share_of_the_samples_and_no_row_twice_in_a_batch(
    counts: list[tuple[int, int]], shares: tuple[float, float]
) -> None:
    plan = make_plan(counts, shares, batch=8)
    streams: dict[tuple[int, int], list[int]] = {}
    drawn = Counter[int]()
    for step in range(600):
        places = [plan.at(step * 8 + i) for i in range(8)]
        assert len({place.row for place in places}) == 8, "a batch has a row twice"
        assert len({place.bucket for place in places}) == 1
        for place in places:
            streams.setdefault((place.bucket, place.source), []).append(place.row)
            assert place.row in plan.substitutes(place)
            drawn[place.source] += 1
    for (bucket, source), stream in streams.items():
        rows = sorted(plan._streams[bucket][source].tolist())
        epochs = [stream[first : first + len(rows)] for first in range(0, len(stream) - len(rows) + 1, len(rows))]
        assert epochs
        assert all(sorted(epoch) == rows for epoch in epochs)
    assert abs(drawn[0] / drawn.total() - shares[0]) < 0.02


def test_any_position_of_a_mixture_is_reached_without_those_before_it() -> None:
    settings = ([(15, 11), (9, 30), (33, 14)], (0.4, 0.6), 8)
    walked = make_plan(*settings)
    order = [walked.at(position) for position in range(4000)]
    for position in (3999, 12, 2711, 0, 3998, 801):
        assert make_plan(*settings).at(position) == order[position]
    later = make_plan(*settings, first=37 * 8)
    assert [later.at(position) for position in range(37 * 8, 57 * 8)] == order[37 * 8 : 57 * 8]


def test_the_order_of_a_mixture_is_the_one_written_down_here() -> None:
    plan = make_plan([(6, 9)], (0.5, 0.5), batch=4)
    assert [(plan.at(n).source, plan.at(n).row) for n in range(12)] == WRITTEN


WRITTEN = [(0, 14), (1, 2), (0, 8), (1, 7), (0, 10), (1, 13), (0, 5), (1, 11), (0, 6), (1, 1), (0, 0), (1, 12)]


def test_a_source_too_small_for_its_share_of_a_step_is_told_by_its_name() -> None:
    mixed = Mixed(np.repeat(np.arange(2), (3, 500)).astype(np.int16), (0.5, 0.5), ("small", "large"))
    message = sentence(lambda: merge_small({(8, 8): (2, 300), (8, 16): (1, 200)}, 16, mixed))
    assert message.startswith("small has 3 samples for 50.00% of the 16 of one step over all ranks (train.batch)")


# Sources


def test_sources_have_names_weights_and_columns_of_their_own() -> None:
    data = Data(
        path=("/a/flux=3", "https://u:p@host/x/flux?sig=a=1", "b/mj=0.5"),
        caption_columns=("caption", "long"),
        source_columns=("flux#2:image=jpg", "mj:captions=llava, prompt"),
    )
    found = sources_of(data)
    assert [(s.name, s.weight, s.image_column) for s in found] == [
        ("flux", 3, "image"), ("flux#2", 1, "jpg"), ("mj", 0.5, "image"),
    ]  # fmt: skip
    assert [s.caption_columns for s in found] == [("caption", "long"), ("caption", "long"), ("llava", "prompt")]


@pytest.mark.parametrize(
    ("path", "columns", "said"),
    [
        (("a=1", "b"), (), "data.path gives weights, but none for b; write b=1, or leave out all of them"),
        (("a=0", "b=1"), (), "data.path a=0: a weight is a number above 0; for a it is 0"),
        (("a=-1", "b=1"), (), "data.path a=-1: a weight is a number above 0; for a it is -1"),
        (("a", "b"), ("c:image=x",), "data.source_columns 'c:image=x': the sources are a, b"),
        (("a", "b"), ("a:size=x",), "data.source_columns 'a:size=x' is not of the form SOURCE:image=COLUMN"),
        ("a", ("a:image=x",), "data.source_columns is for several sources"),
        ("", (), "this preset reads pictures: give their folder with --data.path"),
    ],
)
def test_sources_that_say_nothing_clear_are_sentences(
    path: tuple[str, ...], columns: tuple[str, ...], said: str
) -> None:
    assert sentence(lambda: sources_of(Data(path=path, source_columns=columns))).startswith(said)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small forms of the recipe's layouts: a parquet file, two with columns partly null, a tar, and a folder."""
    root = tmp_path_factory.mktemp("sources")
    cells = [{"bytes": plain(n), "path": None} for n in range(12)]
    write_parquet(
        root / "flux/train.parquet", 12, image=cells, caption=None, caption_caption=[f"flux {n}" for n in range(12)]
    )
    detail = [f"reason {n}" if n % 2 else None for n in range(6)]
    write_parquet(
        root / "reason/a/train-0.parquet", 6, first=50, caption=None, caption_detail=detail, caption_original=["o"] * 6
    )
    write_parquet(
        root / "reason/b/train-1.parquet", 6, first=56, caption=None, caption_detail=None, caption_original=["o"] * 6
    )
    samples = [
        (f"{n}", {"jpg": plain(100 + n), "json": json.dumps({"llava": f"mj {n}", "prompt": "no"}).encode()})
        for n in range(12)
    ]
    write_tar(root / "mj/train-000.tar", samples)
    write_folder(
        root / "own",
        [{"file_name": f"{n}.png", "caption": f"own {n}", "split": "val" if n > 7 else "train"} for n in range(10)],
    )
    return root


def words(root: Path, *extra: str, weights: tuple[int, ...] = (4, 2, 1, 1)) -> list[str]:
    paths = [f"{root / name}={weight}" for name, weight in zip(("flux", "reason", "mj", "own"), weights, strict=True)]
    return [
        "prx-512", *TINY, "--model.patch-size", "8", "--data.height", "16", "--data.width", "16", "--data.workers", "0",
        "--data.path", *paths,
        "--data.caption-columns", "caption_caption", "caption_detail", "caption_original", "caption",
        "--data.source-columns", "mj:captions=llava", "--data.no-buckets",
        "--repa.no-enabled", "--lpips.no-enabled", "--pdino.no-enabled", "--text.kind", "bytes",
        "--model.context-in-dim", "32", "--train.device", "cpu", "--evaluation.grid", "0", *extra,
    ]  # fmt: skip


def recipe(root: Path, *extra: str) -> Recipe:
    made = parse(words(root, *extra)).recipe
    assert isinstance(made, Recipe)
    return made


def read(made: Recipe, world: World = World(0, 1, CPU), start: int = 0) -> list[Batch]:  # noqa: B008
    return list(batches(open_dataset(made.data, 0, 8), made, world, start))


def test_a_step_of_a_mixture_has_the_same_samples_at_any_world_size_and_after_a_resume(sources: Path) -> None:
    made = recipe(sources, "--train.steps", "12")
    whole = read(made)
    for world in (2, 4):
        ranks = [read(made, World(rank, world, CPU)) for rank in range(world)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            assert torch.equal(torch.cat([part.image for part in parts]), whole[step].image)
            assert sum((part.captions for part in parts), []) == whole[step].captions
    again = read(recipe(sources, "--train.steps", "12", "--data.workers", "1"), start=5)
    for one, other in zip(again, whole[5:], strict=True):
        assert torch.equal(one.image, other.image)
        assert one.captions == other.captions
        assert one.sources is not None
        assert torch.equal(one.sources, other.sources)  # type: ignore[arg-type]
    counts = torch.bincount(torch.cat([batch.sources for batch in whole if batch.sources is not None]))
    assert counts.tolist() == [48, 24, 12, 12]
    for batch in whole:  # a picture's caption is one of its own source's columns
        for name, source in zip(batch.captions, batch.sources.tolist(), strict=True):  # type: ignore[union-attr]
            assert name.split()[0] in (("flux",), ("reason", "o"), ("mj",), ("own",))[source]


def test_a_mixture_goes_through_doctor_a_dry_run_and_training_and_tells_its_losses_apart(
    sources: Path, tmp_path: Path
) -> None:
    done = run_program("doctor", *words(sources), "--json")
    found = json.loads(done.stdout)
    assert [(s["name"], s["share"], s["samples"]) for s in found["sources"]] == [
        ("flux", 0.5, 12), ("reason", 0.25, 12), ("mj", 0.125, 12), ("own", 0.125, 8),
    ]  # fmt: skip
    assert (found["samples"], found["validation"]) == (44, 2)
    assert found["captions"]["read"] == 12 + 3 + 12 + 12 + 8
    assert "reason: 25.00% of the samples" in run_program("doctor", *words(sources)).stdout
    done = run_program("speedrun", *words(sources), "--dry-run")
    assert done.returncode == 0, done.stderr
    done = run_program("speedrun", *words(sources, "--train.steps", "20", "--output.folder", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "prx-512/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["step"] == 20 and "train/loss" in line]
    parts = {name: line[f"train/loss_by_source/{name}"] for name in ("flux", "reason", "mj", "own")}
    assert len(set(parts.values())) == 4
    mean = sum(share * parts[name] for name, share in zip(parts, (0.5, 0.25, 0.125, 0.125), strict=True))
    assert mean == pytest.approx(line["train/loss"], rel=1e-4)


def test_a_mixture_goes_on_bitwise_and_with_other_weights_only_by_force(sources: Path, tmp_path: Path) -> None:
    def run(folder: str, steps: int, *extra: str, weights: tuple[int, ...] = (4, 2, 1, 1)) -> tuple[int, str]:
        command = words(
            sources, "--train.steps", str(steps), "--output.folder", str(tmp_path / folder), *extra, weights=weights
        )
        done = run_program("speedrun", *command)
        return done.returncode, done.stderr + done.stdout

    assert run("whole", 6)[0] == run("parts", 3)[0] == run("parts", 6)[0] == 0
    files = [
        sorted((tmp_path / f"{f}/prx-512/checkpoints/step-00000006").glob("*.safetensors")) for f in ("whole", "parts")
    ]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    code, said = run("parts", 8, weights=(4, 2, 1, 3))
    assert code == 2
    assert "data.weights [4.0, 2.0, 1.0, 1.0] -> [4.0, 2.0, 1.0, 3.0]" in said
    code, said = run("parts", 8, "--force", weights=(4, 2, 1, 3))
    assert code == 0, said
    assert "going on, as --force says" in said


def test_a_mixture_goes_on_with_fewer_ranks_and_tells_the_same_losses_by_source(sources: Path, tmp_path: Path) -> None:
    def run(folder: str, steps: int, ranks: int) -> dict[str, float]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [str(ROOT / "tests/train/ranks/fault_run.py"), "none@9:0", *words(sources)]
        command += ["--train.steps", str(steps), "--output.folder", str(tmp_path / folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / folder / "prx-512/metrics.jsonl").read_text().splitlines()
        (line,) = [line for line in map(json.loads, lines) if line["step"] == steps and "train/loss" in line]
        return {name: value for name, value in line.items() if name.startswith("train/loss")}

    run("other", 5, ranks=2)
    found, wanted = run("other", 12, ranks=1), run("whole", 12, ranks=2)
    assert {f"train/loss_by_source/{name}" for name in ("flux", "reason", "mj", "own")} < found.keys()
    # Steps 11 and 12, after which the order of sums is all that differs, as in ranks/test_faults.py.
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_source_without_any_of_the_caption_columns_is_told(sources: Path) -> None:
    data = Data(path=(str(sources / "flux=1"), str(sources / "own=1")), caption_columns=("caption",), buckets=False)
    message = sentence(lambda: open_dataset(data, 0, 8))
    assert "flux/train.parquet has no column 'caption' (caption_columns)" in message


def test_a_mixture_without_validation_has_none_and_one_of_one_source_is_it(sources: Path) -> None:
    data = Data(path=(str(sources / "flux=1"),), caption_columns=("caption_caption",), buckets=False)
    one, alone = open_dataset(data, 0, 8), open_dataset(replace(data, path=str(sources / "flux")), 0, 8)
    assert len(one) == len(alone) == 12  # type: ignore[arg-type]
    made = replace(prx_512(), data=data, train=replace(prx_512().train, steps=6, batch=4))
    other = replace(made, data=replace(data, path=str(sources / "flux")))
    assert [batch.captions for batch in read(made)] == [batch.captions for batch in read(other)]
    assert notes(one, 4) == ()
    with pytest.raises(NoSplitError):
        raise NoSplitError("as the validation split of a single source")


def test_the_command_that_fills_the_cache_of_a_mixture_names_its_sources(sources: Path) -> None:
    made = recipe(sources, "--text.kind", "t5gemma", "--text.cache", "c")
    again = parse(shlex.split(precompute_command(made))[2:]).recipe
    assert isinstance(again, Recipe)
    assert again.data == made.data
