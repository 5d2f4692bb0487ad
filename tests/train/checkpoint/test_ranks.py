"""What some ranks save, other numbers of ranks and other layouts load, bit for bit (gloo, in a process of its own)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.commands import ROOT
from train.checkpoint import checkpointer as checkpoint

LOADS = ("load:1:plain", "load:1:shard", "load:2:plain", "load:3:shard", "load:4:hsdp")
SAVES = ("save:1:plain", "save:2:shard", "save:2:plain", "save:4:hsdp")


@pytest.fixture(scope="module", params=SAVES)
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Ranks that failed, by step, after one save; and the run's folder."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.train.checkpoint.ranks", str(folder), request.param, *LOADS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop(request.param) == 0, done.stderr
    print(done.stderr, file=sys.stderr)
    return folder, found


def test_every_layout_loads_the_same_bits(failures: tuple[Path, dict[str, int]]) -> None:
    """Uneven and empty shards, tensors without rows, 0-d ones, five dtypes, NaN and -0.0; `LOADS` says on what."""
    assert failures[1] == dict.fromkeys(LOADS, 0)


def test_whole_tensors_are_the_same_in_one_process(failures: tuple[Path, dict[str, int]]) -> None:
    from tests.train.checkpoint.ranks import bits, truth

    saved = checkpoint.load(checkpoint.complete(failures[0])[-1])
    whole = truth()
    assert saved.tensors.keys() == whole.keys()
    for section, content in whole.items():
        assert saved.tensors[section].keys() == content.keys()
        wrong = [name for name, tensor in content.items() if bits(tensor) != bits(saved.tensors[section][name])]
        assert not wrong


def test_replicas_are_written_once(failures: tuple[Path, dict[str, int]]) -> None:
    from tests.train.checkpoint.ranks import truth

    size = sum(t.numel() * t.element_size() for content in truth().values() for t in content.values())
    files = checkpoint.complete(failures[0])[-1].glob("*.safetensors")
    # What is no tensor data is headers: their length is in the first 8 bytes of a file.
    data = sum(len(c) - 8 - int.from_bytes(c[:8], "little") for c in (file.read_bytes() for file in files))
    assert data == size
