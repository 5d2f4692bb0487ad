"""A budget is a text that comes back as it was written; a step that costs more fails, and says which kernels do."""

import copy
from typing import Any

import pytest

from benchmarks.absent_gpu import budget


def facts() -> dict[str, Any]:
    """As `report.facts` gives them, with two kernels."""
    kernel = {"part": "denoiser", "kind": "product", "name": "mm", "shapes": "4x4 bf16"}
    other = {"part": "lpips", "kind": "inductor", "name": "triton_poi_fused_add", "shapes": "8 f32"}
    first = {"launches": 10, "GB": 20.0, "TFLOP": 5.0, "floor_ms": 1.0, "expected_ms": 2.0}
    second = {"launches": 5, "GB": 1.0, "TFLOP": 0.0, "floor_ms": 1.0, "expected_ms": 2.0}
    return {
        "setting": {"preset": "prx-512", "batch": 32, "ranks": 1, "nodes": 1, "small": True, "settings": []},
        "versions": {"torch": "2.15.0", "triton": "3.9.0"},
        "total": {"launches": 15, "GB": 21.0, "TFLOP": 5.0, "floor_ms": 2.0, "expected_ms": 4.0},
        "parts": [kernel | first, other | second],
        "kernels": [kernel | first, other | second],
        "memory": {"peak_GB": 10.0, "between_steps_GB": 4.0},
        "graphs": {"0/0": "denoiser"}, "graph_breaks": 0, "recompilations": {}, "fallbacks": {}, "waits": {},
        "kernels_on_the_host": {}, "wrong_layouts": [], "builds": [{"error": ""}], "spilling": [],
    }  # fmt: skip


def test_a_step_keeps_to_the_budget_that_was_written_from_it() -> None:
    found = facts()
    made_with, figures, kernels = budget.read(budget.text(found))
    assert made_with == "torch 2.15, Triton 3.9"
    assert figures == pytest.approx(budget.figures(found))
    assert kernels == budget.kernels(found)
    assert budget.over(found, budget.text(found)) == []
    assert budget.under(found, budget.text(found)) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("total", "launches"), 16, "launches: 16, the budget is 15"),
        (("total", "GB"), 21.3, "GB: 21.3, the budget is 21"),
        (("memory", "peak_GB"), 10.2, "peak GB: 10.2, the budget is 10"),
        (("graph_breaks",), 1, "graph breaks: 1, the budget is 0"),
        (("waits",), {"lpips: a value of the device is read at train/step.py:1": 2}, "waits: 2, the budget is 0"),
        (("spilling",), [{"kernel": "k"}], "spilling kernels: 1, the budget is 0"),
        (("builds",), [{"error": "no such tile"}], "failed builds: 1, the budget is 0"),
        (("graphs",), {"0/0": "denoiser", "0/1": "denoiser"}, "graphs: 2, the budget is 1"),
    ],
)
def test_a_figure_that_rises_by_more_than_one_percent_is_named(path: tuple[str, ...], value: Any, said: str) -> None:
    found = facts()
    allowed = budget.text(found)
    held: Any = found
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    assert budget.over(found, allowed)[0] == said


def test_a_rise_within_one_percent_passes_and_a_fall_is_told() -> None:
    found = facts()
    allowed = budget.text(found)
    found["total"]["GB"] = 21.2
    assert budget.over(found, allowed) == []
    found["total"]["GB"] = 15.0
    assert budget.over(found, allowed) == []
    assert budget.under(found, allowed) == ["GB: 15, the budget is 21"]


def test_kernels_that_are_new_or_grew_are_named() -> None:
    found = facts()
    allowed = budget.text(found)
    grown = copy.deepcopy(found)
    grown["total"] |= {"launches": 17, "GB": 30.0}
    grown["kernels"][0] |= {"GB": 28.0}
    grown["kernels"].append(
        {"part": "denoiser", "kind": "eager", "name": "_to_copy", "shapes": "", "launches": 2, "GB": 1.0, "TFLOP": 0.0}
    )
    said = "\n".join(budget.over(grown, allowed))
    assert "new: 2 x denoiser, eager, _to_copy, 1.000 GB" in said
    assert "grew: denoiser, product, mm: 10 → 10 launches, 20.000 → 28.000 GB" in said
    assert "triton_poi_fused_add" not in said
