"""What makes `pytest benchmarks/ --benchmark-only` trustworthy: the clock, the checks, the machine, the summary.

The parts are in clock.py (device time), measure.py (check, then time), machine.py (ceilings, versions) and summary.py.
On a GPU every benchmark has two rows, device time and wall time; on a CPU one, marked as no result.
"""

import gc
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import machine, summary
from benchmarks.clock import CLOCK
from benchmarks.machine import Ceilings
from benchmarks.measure import Measure, Row

ROWS = pytest.StashKey[list[Row]]()
BEGAN = time.monotonic()
CEILINGS = pytest.StashKey[Ceilings | None]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[CEILINGS] = None
    if torch.cuda.is_available():
        # The recipe's precision; peers get the same.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)  # sizes are tiny: threads would only wait for one another


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" in metafunc.fixturenames:
        # A step has one: it is launched as it is trained, so the host's time is part of it.
        clocks = getattr(metafunc.module, "CLOCKS", ("device", "wall")) if torch.cuda.is_available() else ("cpu",)
        metafunc.parametrize("measure", clocks, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool, bool, bool, int]:
    """When a row's turn comes, for runs that `PRX_BENCH_SECONDS` cuts short: steps in their own order; of the rest
    device time first, each op's first case before its others, and eager before what has to be compiled."""
    callspec = getattr(item, "callspec", None)
    params, indices = (callspec.params, callspec.indices) if callspec else ({}, {})
    case = max((indices[name] for name in ("case", "name", "batch") if name in indices), default=0)
    compiled = any(isinstance(value, str) and "compiled" in value for value in params.values())
    is_step = hasattr(getattr(item, "module", None), "CLOCKS")
    return not is_step, params.get("measure") == "wall", case > 0, compiled, case


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    """Both ceilings of this machine, measured once in this run, before the first row."""
    found = machine.measure_ceilings()
    request.config.stash[CEILINGS] = found
    return found


@pytest.fixture
def measure(request: pytest.FixtureRequest, ceilings: Ceilings, benchmark: Any) -> Iterator[Measure]:
    """Check and time one function; see `Measure.__call__`.

    Skipped by name where `PRX_BENCH_SECONDS` of this run are spent, so that the rows before it are kept.
    """
    limit = float(os.environ.get("PRX_BENCH_SECONDS", "inf"))
    if time.monotonic() - BEGAN > limit:
        pytest.skip(f"the {limit:g} s that PRX_BENCH_SECONDS gives this run are spent")
    yield Measure(benchmark, request.param, request.config.stash[ROWS])
    if torch.cuda.is_available():
        torch.compiler.reset()
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):  # what pytest keeps of a failed row
            vars(sys).pop(name, None)
        gc.collect()  # compiled modules refer to themselves
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(machine.describe())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    found = config.stash[CEILINGS]
    output_json["ceilings"] = asdict(found) if found else None


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows, found = config.stash[ROWS], config.stash[CEILINGS]
    if not rows or found is None:
        return
    terminalreporter.section("what was measured")
    for line in summary.lines(rows, found):
        terminalreporter.write_line(line)
