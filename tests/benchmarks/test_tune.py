"""Choosing the tiles of symmetric products: what is counted, the rows that follow, and how they are written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import tiles, tune
from prx_kernels.newton_schulz import symmetric_kernels as kernels


def test_shared_memory_bounds_each_candidate_by_count() -> None:
    """Clocks of one 16-deep product: reads and fills of shared memory against the matrix units'."""
    assert [round(tiles.share(config), 2) for config in kernels.CANDIDATES] == [0.5, 0.67, 0.8, 0.8, 0.89]
    assert [tiles.beside(config) for config in kernels.CANDIDATES] == [3, 2, 1, 2, 1]


def test_the_tables_rows_lose_little_by_count() -> None:
    """Of every batch, against the candidate that counting prefers: an eighth at most, at batch 1."""
    for batch in range(1, 25):
        config = next(c for limit, c in kernels.TMA[90] if tune.size_of((batch, 1792)) <= limit)
        lost = tiles.seconds(batch, 1792, 1792, config) / tiles.seconds(
            batch, 1792, 1792, tiles.best(batch, 1792, 1792)
        )
        assert lost <= (1.08 if batch == 1 else 1.01), (batch, config)


def test_rows_name_the_quickest_and_join_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    found = {(1, 896): [1.0, 2, 3, 4, 5], (1, 1792): [2.0, 1, 3, 4, 5], (3, 1792): [9.0, 2, 1, 3, 4],
             (5, 1792): [9.0, 2, 1, 3, 4]}  # fmt: skip
    assert tune.rows(found) == [(28, 0), (105, 1), (2**31 - 1, 2)]
    assert tune.as_source(tune.rows(found)) == "((28, _SMALL), (105, _HALF), (2**31 - 1, _WHOLE))"
    assert tune.main(["--count", "--batches", "1", "8"]) == 0
    assert "8  1792       123.4         97.2        107.0         88.9*" in capsys.readouterr().out


def test_names_are_the_candidates() -> None:
    assert [getattr(kernels, name) for name in tune.NAMES] == list(kernels.CANDIDATES)


def test_what_is_written_is_python_that_holds_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "symmetric_kernels.py"
    shutil.copy(tune.TABLE, copy)
    monkeypatch.setattr(tune, "TABLE", copy)
    assert tune.main(["--count", "--write", "--batches", "4"]) == 0
    before, after = (path.read_text().splitlines() for path in (Path(kernels.__file__), copy))
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [b for _, b in changed] == ["_HOPPER = ((28, _SMALL), (2**31 - 1, _TWO_BLOCKS))"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu_it_says_what_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs a GPU of compute capability 9.0, whose table this is; --count goes without" in capsys.readouterr().err
