"""The wheel: what is in it, what it asks for, and that it works where there is torch and nothing else."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import prx_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("prx_kernels", "prx_model")
# What is installed beside torch wherever tests run, and what a wheel taken home must not need.
ABSENT = ["numpy", "transformers", "timm", "lpips", "diffusers", "safetensors", "torchvision", "sentencepiece"]
ABSENT += ["tokenizers", "PIL", "scipy", "tyro", "rich", "pyarrow", "tensorboard"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend of pyproject.toml from the working tree, without the network."""
    pytest.importorskip("hatchling", reason="needs hatchling, which `uv sync` installs")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wheels = list(folder.iterdir())
    assert [w.name for w in wheels] == [f"prx_kernels-{prx_kernels.__version__}-py3-none-any.whl"]
    return wheels[0]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    info = f"prx_kernels-{prx_kernels.__version__}.dist-info/METADATA"
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_string(archive.read(info).decode("utf-8"))


def test_the_wheel_holds_both_packages_their_type_markers_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"prx_kernels-{prx_kernels.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    sources = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert len(sources) > 10
    markers = {f"{package}/py.typed" for package in PACKAGES}
    assert {name for name in names if not name.startswith(info)} == sources | markers
    assert f"{info}/licenses/LICENSE" in names


def test_base_dependencies_are_torch_and_triton_alone(metadata: Message) -> None:
    lines = metadata.get_all("Requires-Dist") or []
    base = {line for line in lines if "extra ==" not in line}
    assert {re.split(r"[<>=;\s]", line)[0] for line in base} == {"torch", "triton"}
    assert [line for line in base if line.startswith("triton") and "linux" not in line] == []
    assert set(metadata.get_all("Provides-Extra") or []) == {"model", "train", "flash", "hf", "s3", "gcs"}


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that `uv sync` makes")
def test_the_environment_holds_the_versions_that_are_said_to_be_tested() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    for line in settings["constraint-dependencies"]:
        constraint = Requirement(line)
        if constraint.marker is None or constraint.marker.evaluate():
            assert constraint.specifier.contains(version(constraint.name)), f"{line}, got {version(constraint.name)}"


def test_name_version_licence_and_python_are_declared(metadata: Message) -> None:
    assert metadata["Name"] == "prx-kernels"
    assert metadata["Version"] == prx_kernels.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


# As if they were not installed: not found, for those who import and for those who only look.
HIDE = """
import importlib.util, sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("numpy") is None
"""
KERNELS = """
import torch, prx_kernels as k
ids, seed = torch.arange(2), torch.tensor(1)
keep = k.sample_keep(ids, 6, 0.5, seed=seed)
image = k.philox_normal(seed, (2, 3, 4, 6))
tokens = k.patchify(image, 2)
y, byp = k.enter_route(tokens, keep)
assert torch.equal(k.exit_route(y, byp, keep), tokens)
assert k.x_prediction_loss(tokens, image, torch.ones(2), 2).item() == 0
found = k.__file__
"""
MODEL = """
import torch, prx_model
config = prx_model.PRXConfig(patch_size=4, context_in_dim=8, hidden_size=32, num_heads=2, depth=1, axes_dim=(8, 8))
text, seeds = torch.ones(1, 3, 8), torch.tensor([1])
settings = prx_model.Sampling(steps=2, guidance=1.0)
drawn = prx_model.sample(prx_model.PRXTransformer(config), text, height=8, width=8, seeds=seeds, settings=settings)
assert drawn.shape == (1, 3, 8, 8)
prx_model.ByteTower(8, 1, 2)
found = prx_model.__file__
"""


@pytest.mark.parametrize("code", [KERNELS, MODEL], ids=["kernels", "model"])
def test_the_unpacked_wheel_works_with_torch_alone(wheel: Path, tmp_path: Path, code: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    hide = HIDE.replace("ABSENT", repr(ABSENT))
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}{code}print(found)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), "the checkout was imported instead of the wheel"
