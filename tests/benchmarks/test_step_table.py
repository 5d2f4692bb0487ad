"""The table of a counted step: every part and figure of the JSON files, and the README's region."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, step_table
from benchmarks.absent_gpu import report as counted
from benchmarks.absent_gpu.inductor import Compiled
from benchmarks.absent_gpu.recorder import Launch
from benchmarks.absent_gpu.trainer import Counted, Setting
from benchmarks.machine import ROOT
from benchmarks.step_table import BEGIN, END


def step(preset: str, batch: int, parts: list[tuple[str, str, int, float, float, float]]) -> dict[str, Any]:
    """A file's content with these (part, kind, launches, GB, TFLOP, ms)."""
    names = ("part", "kind", "launches", "GB", "TFLOP", "expected_ms")
    rows = [dict(zip(names, part, strict=True)) for part in parts]
    total = {name: sum(row[name] for row in rows) for name in names[2:]}
    return {
        "setting": {"preset": preset, "batch": batch, "ranks": 1, "nodes": 1, "small": False},
        "parts": rows,
        "total": total,
        "memory": {"peak_GB": 30.61},
        "versions": {"torch": "2.15.0+cu132", "triton": "3.9.0"},
        "graph_breaks": 0,
        "waits": {"a": 3, "b": 4},
    }  # fmt: skip


FIRST = step(
    "prx-512",
    32,
    [
        ("denoiser", "product", 1000, 24.25, 22.81, 32.9),
        ("denoiser", "inductor", 444, 36.35, 0.0, 10.86),
        ("denoiser", "host", 7, 0.0, 0.0, 0.0),
        ("repa", "product", 300, 9.0, 5.3, 80.0),
    ],
)
SECOND = step("prx-1024", 16, [("denoiser", "product", 900, 50.0, 44.0, 60.0), ("odd", "eager", 1, 0.1, 0.0, 0.1)])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_sums_each_part_over_its_kinds_and_puts_the_dearest_first() -> None:
    lines = step_table.markdown([FIRST, SECOND]).splitlines()
    assert [cells(line) for line in lines[:1] + lines[2:6]] == [
        ["", "prx-512 × 32: launches", "GB", "TFLOP", "expected ms"]
        + ["prx-1024 × 16: launches", "GB", "TFLOP", "expected ms"],
        ["**whole step**", "1,751", "69.6", "28.1", "123.8", "901", "50.1", "44.0", "60.1"],
        ["denoiser, forward and backward", "1,451", "60.6", "22.8", "43.8", "900", "50.0", "44.0", "60.0"],
        ["REPA teacher", "300", "9.0", "5.3", "80.0", "–", "–", "–", "–"],
        ["odd", "–", "–", "–", "–", "1", "0.1", "0.0", "0.1"],
    ]
    assert "prx-512 × 32: 30.6 GB of memory at the peak, 0 graph breaks, 7 waits of the host; torch 2.15.0" in lines[7]


def test_it_reads_what_dry_step_writes(tmp_path: Path) -> None:
    launches = [Launch("denoiser", "", "product", "mm", "8x8", 4.3e9), Launch("step", "", "host", "copy", "8", 1e9)]
    found = Counted(Setting("prx-512", 32), launches, {}, 0, 0, [], {}, Compiled())
    path = tmp_path / "step.json"
    path.write_text(json.dumps(counted.facts(found, [])))
    lines = step_table.markdown([step_table.load(path)]).splitlines()
    assert [cells(line)[:3] for line in lines[2:4]] == [
        ["**whole step**", "2", "4.3"],
        ["denoiser, forward and backward", "1", "4.3"],
    ]


def test_writing_replaces_the_region_alone_and_other_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, path, odd = tmp_path / "README.md", tmp_path / "step.json", tmp_path / "odd.json"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n{report.BEGIN}\n{report.END}\n")
    path.write_text(json.dumps(FIRST))
    monkeypatch.setattr("sys.argv", ["step_table", str(path), "--write", str(readme)])
    step_table.main()
    made = step_table.markdown([FIRST])
    assert readme.read_text() == f"before\n{BEGIN}\n{made}\n{END}\nafter\n{report.BEGIN}\n{report.END}\n"
    assert capsys.readouterr().out == f"{made}\n"
    odd.write_text("[]")
    monkeypatch.setattr("sys.argv", ["step_table", str(odd)])
    with pytest.raises(SystemExit):
        step_table.main()
    assert "odd.json is not what python -m benchmarks.dry_step" in capsys.readouterr().err


def test_the_readme_holds_a_counted_step_or_says_that_there_is_none() -> None:
    text = (ROOT / "README.md").read_text()
    region = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert region == step_table.NOT_COUNTED or "| **whole step** |" in region
