"""The report: what stands in the README is what the result files hold, losing rows included, or "not measured yet"."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import figures, project, report
from benchmarks.machine import ROOT
from benchmarks.report import BEGIN, END, NOT_MEASURED
from tests.benchmarks import result_files
from train.run.hours import Assumptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return results


def test_without_results_it_says_not_measured_yet_and_draws_nothing(folder: Path) -> None:
    readme = folder.parent / "README.md"
    assert report.report(folder, readme, write=True) == NOT_MEASURED
    result_files.write(folder / "cpu.json", on_gpu=False)
    assert report.report(folder, readme, write=True) == NOT_MEASURED
    assert readme.read_text() == f"before\n{BEGIN}\n{NOT_MEASURED}\n{END}\nafter\n"
    assert not list(folder.glob("*.png"))


def test_written_tables_hold_every_row_and_set_losing_ones_in_bold(folder: Path) -> None:
    result_files.write(folder / "h200.json")
    made = report.report(folder, folder.parent / "README.md", write=True)
    table = [line for line in made.splitlines() if line.startswith("| ")]
    assert len(table) == 2 * 2 + len(result_files.rows())
    cells = {tuple(cell.strip() for cell in line.strip("|").split("|"))[:3]: line for line in table}
    ours = cells["all ingredients", "512 px x 32, text 40% full", "ours"]
    assert "| 100 ms | 320 | 25.0% (50.0%) | 60.0 GiB |" in ours
    assert "| 3.00x |" in cells["all ingredients", "512 px x 32, text 40% full", "PRX way, compiled"]
    assert "| **0.75x** |" in cells["all ingredients", result_files.SECOND, "PRX way, compiled"]
    routes = [line for line in table if line.startswith("| enter + exit route |")]
    assert ["| 50 us | 88.0% |  |" in line for line in routes] == [True, False]
    assert "| 25 us | 176.0% | **0.50x** |" in routes[1]
    assert "Synthetic GPU, torch 2.15, commit `0123456789`; measured in the same run: copy 4.00 TB/s" in made
    assert "in all " in made
    assert "step times from measured: h200.json" in made


def test_figures_are_drawn_and_named_in_the_readme(folder: Path) -> None:
    result_files.write(folder / "h200.json")
    readme = folder.parent / "README.md"
    report.report(folder, readme, write=True)
    drawn = sorted(path.name for path in folder.glob("*.png"))
    assert drawn == ["projected-hours.png", "roofline-h200.png", "step-h200.png"]
    for name in drawn:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"(results/{name})" in readme.read_text()


def test_check_passes_after_writing_and_fails_after_any_change(folder: Path) -> None:
    result_files.write(folder / "h200.json")
    readme = folder.parent / "README.md"
    with pytest.raises(SystemExit, match="differ; run python -m benchmarks.report --write"):
        report.report(folder, readme, write=False)
    report.report(folder, readme, write=True)
    report.report(folder, readme, write=False)
    before = readme.read_text()
    report.report(folder, readme, write=True)
    assert readme.read_text() == before
    readme.write_text(before.replace("| 320 |", "| 999 |"))
    with pytest.raises(SystemExit, match="differ"):
        report.report(folder, readme, write=False)
    readme.write_text(before)
    slower = [replace(row, seconds=2 * row.seconds) for row in result_files.rows()]
    result_files.write(folder / "h200.json", slower)
    with pytest.raises(SystemExit, match="differ"):
        report.report(folder, readme, write=False)
    result_files.write(folder / "h200.json")
    (folder / "step-h200.png").unlink()
    with pytest.raises(SystemExit, match="differ"):
        report.report(folder, readme, write=False)


def test_files_without_marks_and_files_that_are_no_results_are_refused(folder: Path) -> None:
    for text in ("no marks", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(ValueError, match="the file needs one line"):
            report.replaced(text, "x")
    (folder / "profile-512.json").write_text(json.dumps({"kinds_us": {}, "kernels": []}))
    assert report.load(folder) == []
    (folder / "odd.json").write_text("{}")
    with pytest.raises(ValueError, match="odd.json is no result file"):
        report.load(folder)


def test_without_both_stages_hours_are_not_measured_yet(folder: Path) -> None:
    result_files.write(folder / "h200.json", [row for row in result_files.rows() if row.case != result_files.SECOND])
    made = report.report(folder, folder.parent / "README.md", write=True)
    assert "Hours of the whole recipe: not measured yet" in made
    assert "projected-hours" not in made


def test_bars_are_the_whole_step_and_hours_those_of_the_projection() -> None:
    parts = figures.step_parts(result_files.rows())
    assert parts["512 px x 32, text 40% full", "ours"] == pytest.approx((80.0, 20.0))
    found = dict(figures.hours(project.floors()))
    stages = project.project(project.floors(), Assumptions())
    assert found[32] == pytest.approx([stage.hours for stage in stages])
    assert sum(found[8]) > sum(found[16]) > sum(found[32])


def test_the_readme_holds_the_report_of_the_results_here() -> None:
    report.report(report.RESULTS, ROOT / "README.md", write=False)
