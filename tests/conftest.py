"""Fixtures that several test folders share; the whole suite runs on two cores where pytest-xdist is installed."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # Read when torch is loaded: two workers of two spinning threads each would stand in one another's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Two workers, a file each at a time, for `pytest` alone: not where paths, a debugger or workers are asked for."""
    alone = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    cores = os.cpu_count() or 1
    possible = cores >= 2 and not IS_WORKER and config.pluginmanager.hasplugin("xdist")
    if alone and possible and config.option.numprocesses is None:
        config.option.numprocesses = 2
        config.option.tx = ["popen"] * 2
        config.option.dist = "loadfile"


@pytest.fixture(scope="session")
def pictograms() -> Path:
    """The folder of real captioned pictures beside a developer's checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data" / "pictograms"
    if not folder.is_dir():
        pytest.skip(f"needs the pictograms data set at {folder}")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip, visibly, where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
