"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
