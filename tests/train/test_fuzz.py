"""Fuzzing: whatever bytes and words come, readers end in a value or one sentence, in bounded time.

The same cases in every run. `PRX_FUZZ_SECONDS=3600 pytest tests/train/test_fuzz.py -n 0` draws new ones for so long.
"""

import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train.checkpoint.damage import reseal
from train.checkpoint import files
from train.checkpoint.checkpointer import Checkpointer, find_newest, load
from train.commandline import field_names, parse
from train.data.index import open_images
from train.data.quarantine import Quarantine
from train.data.readers import ImageDataset
from train.errors import UserError
from train.recipes import shapes
from train.run.folder import read_config, write_config
from train.run.metrics import drop_metrics_after
from train.shown import address, printable

from .data.picture_files import plain, write_folder, write_parquet

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Truncated File Read"),
]
SECONDS = float(os.environ.get("PRX_FUZZ_SECONDS", "0"))
if SECONDS:
    pytestmark.append(pytest.mark.timeout(SECONDS + 600))
PARTS = 8
"""Tests here, which share the seconds."""


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Fixed cases; or new ones for this test's share of PRX_FUZZ_SECONDS."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    common: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": quiet}
    if not SECONDS:
        return settings(max_examples=examples, derandomize=True, **common)

    def long(test: Callable[..., None]) -> Callable[..., None]:
        drawn = settings(max_examples=max(examples, 200), **common)(test)

        @functools.wraps(drawn)
        def repeated(*arguments: Any, **named: Any) -> None:
            until = time.monotonic() + SECONDS / PARTS
            while time.monotonic() < until:
                drawn(*arguments, **named)

        return repeated

    return long


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    """Changes of a file: bytes put over others, put in, or cut out, at places in thousandths of its length."""
    kinds = st.sampled_from(["over", "in", "cut", "end"])
    some = st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from([b"\xff" * 8, b"\0" * 16, b"-1", b"9" * 30, b"NaN", b"[" * 50, b"\xed\xa0\x80", b"\x80\0\0\0"]),
    )
    return draw(st.lists(st.tuples(kinds, st.integers(0, 1000), some), min_size=1, max_size=5))


def changed(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, some in changes:
        at = len(content) * place // 1000
        if kind == "over":
            content = content[:at] + some + content[at + len(some) :]
        elif kind == "in":
            content = content[:at] + some + content[at:]
        elif kind == "cut":
            content = content[:at] + content[at + 7 * len(some) :]
        else:
            content = content[:at]
    return content


def read_all(folder: Path) -> None:
    """Open a data set, read every row and caption; each ends in a value or a sentence."""
    try:
        index = open_images(folder)
        index.sizes("width", "height")
        dataset = ImageDataset(index, height=8, width=8, seed=0, shuffle=False)
    except UserError as error:
        assert_sentence(error)
        return
    for problem in index.problems:
        assert_sentence(problem)
    list(dataset.captions())
    for row in range(min(len(index), 8)):
        try:
            example = dataset[row]
            assert example.image.shape == (8, 8, 3)
        except UserError as error:
            assert_sentence(error)


def assert_told(error: object) -> None:
    """Words that any terminal and file takes, once they are escaped."""
    text = printable(str(error))
    text.encode()
    assert len(text) < 4000


def assert_sentence(error: object) -> None:
    """The same, on one line."""
    assert_told(error)
    assert "\n" not in str(error)


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """A shard of each kind, as bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            members = {"png": plain(number), "txt": b"grey", "json": json.dumps({"width": 8, "height": 8}).encode()}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{'long' * 30 if number == 2 else ''}{number}ä.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with tempfile.TemporaryDirectory() as folder:
        split = ["train"] * 6 + ["val"] * 2
        parquet = write_parquet(
            Path(folder) / "a.parquet", 8, key=[f"k{n}" for n in range(8)], split=split
        ).read_bytes()
    return {"tar": stream.getvalue(), "parquet": parquet}


@fuzz(250)
@given(changes=edits())
def test_a_damaged_tar_is_read_or_told(whole: dict[str, bytes], changes: list[tuple[str, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(changed(whole["tar"], changes))
        read_all(Path(folder))


@fuzz(150)
@given(changes=edits())
def test_a_damaged_parquet_is_read_or_told(whole: dict[str, bytes], changes: list[tuple[str, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.parquet").write_bytes(changed(whole["parquet"], changes))
        read_all(Path(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["file_name", "caption", "split", "width", "height", "key", "image"])


@fuzz(200)
@given(
    entries=st.lists(st.dictionaries(NAMES, JSON | st.sampled_from(["0.png", "/dev/null", "..", ""])), max_size=4),
    changes=st.none() | edits(),
)
def test_any_jsonl_is_read_or_told(entries: list[dict[str, Any]], changes: list[tuple[str, int, bytes]] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(Path(folder), [{"file_name": "0.png", "caption": "a"}]) / "captions.jsonl"
        lines = path.read_bytes() + "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        path.write_bytes(changed(lines, changes) if changes else lines)
        read_all(Path(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, of a matrix each."""
    import torch

    folder = tmp_path_factory.mktemp("fuzz") / "run"
    folder.mkdir()
    write_config(folder, shapes())
    checkpointer = Checkpointer(folder, keep=3)
    facts = {"fingerprint": "a", "stage": 0, "first_position": 0, "position": 8, "skipped": [0, 0], "seconds": 1.0}
    for step in (1, 2):
        checkpointer.save(step, {"model": {"w": torch.ones(3, 4)}}, facts, wait=True)
    checkpointer.close()
    return folder


SIDE_FILES = ["state.json", "manifest.json", "COMPLETE", "config.json", "model.rank00000.safetensors"]


@fuzz(200)
@given(name=st.sampled_from(SIDE_FILES), changes=edits(), sealed=st.booleans())
def test_a_changed_file_of_a_checkpoint_is_found_and_the_one_before_taken(
    run: Path, name: str, changes: list[tuple[str, int, bytes]], sealed: bool
) -> None:
    """With `sealed`, by somebody who makes the hashes fit."""
    with tempfile.TemporaryDirectory() as there:
        copy = Path(there) / "run"
        shutil.copytree(run, copy)
        folder = files.step_folder(copy, 2)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(changed(content, changes))
        if sealed and name not in ("manifest.json", "COMPLETE"):
            reseal(folder)
        try:
            load(folder)
            read_config(folder)
            good = True
        except UserError as error:
            assert_sentence(error)
            good = False
        found = find_newest(copy)
        assert found is not None
        assert found.step == 1 or good or name == "config.json"
        if changed(content, changes) != content and not sealed:
            assert found.step == 1


@fuzz(200)
@given(values=st.dictionaries(st.sampled_from(["step", "skipped", "seconds", "position", "format", "stage"]), JSON))
def test_any_values_of_a_state_are_followed_only_where_they_can_be_right(run: Path, values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "step-00000002"
        shutil.copytree(files.step_folder(run, 2), folder)
        state = json.loads((folder / "state.json").read_bytes())
        (folder / "state.json").write_text(json.dumps({**state, **values}))
        reseal(folder)
        try:
            assert load(folder).step == 2
        except UserError as error:
            assert_sentence(error)


@fuzz(300)
@given(
    content=st.binary(max_size=200) | st.lists(JSON, max_size=5).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
def test_any_metrics_quarantine_and_config_are_read_or_told(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        (folder / "quarantine").mkdir()
        for name in ("metrics.jsonl", "quarantine/rank-0.jsonl", "config.json"):
            (folder / name).write_bytes(content)
        drop_metrics_after(folder, 10)
        try:
            Quarantine(folder, 0, 0.0).check(5, 10)
        except UserError as error:
            assert_sentence(error)
        try:
            read_config(folder)
        except UserError as error:
            assert_sentence(error)


FIELDS = sorted(field_names(shapes()))
VALUES = st.sampled_from(["0", "-1", "nan", "inf", "1e20", "9" * 25, "", "yes", "a b", "\x1b[2J", "--", "{}", "None"])


@fuzz(60)
@given(
    words=st.lists(
        st.one_of(
            st.tuples(
                st.sampled_from(FIELDS).map(lambda n: f"--{n.replace('_', '-')}"), VALUES | st.text(max_size=6)
            ).map(list),
            st.text(max_size=12).map(lambda word: [word]),
            st.sampled_from([["--force"], ["--no-muon"], ["--dry-run"], ["--gpus", "0"], ["--profile", "steps=9"]]),
        ),
        max_size=3,
    )
)
def test_any_command_line_is_taken_or_told(words: list[list[str]]) -> None:
    line = [word for group in words for word in group if word not in ("-h", "--help")]
    try:
        parse(["shapes", *line])
    except UserError as error:
        assert_told(error)


@fuzz(300)
@given(
    user=st.text("abcXYZ:!$&*+,;=?#/%-._~{}", max_size=10),
    rest=st.text("abc/{}0.", max_size=10),
    query=st.text("abcSEC=&%{}", max_size=10),
)
def test_no_password_and_no_signature_is_shown(user: str, rest: str, query: str) -> None:
    shown = address(f"https://user:{user}SECRET@host/{rest}?sig={query}SECRET")
    assert "SECRET" not in shown
    assert shown.startswith("https://host/")
