"""The harness itself: its clock, its checks, its arithmetic. A benchmark is worth what these hold."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import clock, passes, peers, summary
from benchmarks.clock import Clock, input_sets, launches_for, wall_timing
from benchmarks.machine import Ceilings
from benchmarks.measure import CPU_NOTE, Row
from benchmarks.peers import Peer
from benchmarks.traffic import EagerTraffic

ROOT = Path(__file__).resolve().parents[2]


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-p", "no:cacheprovider", *arguments]
    # Not a worker of this suite's own pytest-xdist, which pytest-benchmark would refuse to run under.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


# --- clock ---------------------------------------------------------------------------------------------------------


def test_clock_stands_still_between_advances_and_sums_them_exactly():
    ticking = Clock()
    before = ticking()
    for _ in range(1000):
        begin = ticking()
        ticking.advance(37e-6)
        assert ticking() - begin == pytest.approx(37e-6, rel=1e-9)
    assert ticking() - before == pytest.approx(37e-3, rel=1e-9)


@pytest.mark.parametrize("duration", [-1e-9, float("nan"), float("inf")])
def test_clock_refuses_what_is_no_duration(duration):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        Clock().advance(duration)


def test_pytest_benchmark_reports_the_synthetic_durations(tmp_path):
    """Through the real plugin: rounds of 1, 2, 3, 4 and 90 ms that take no time at all give just these statistics."""
    (tmp_path / "test_synthetic.py").write_text(
        "import pytest\n"
        "from benchmarks.clock import CLOCK\n"
        "@pytest.mark.benchmark(timer=CLOCK)\n"
        "def test_synthetic(benchmark):\n"
        "    durations = iter([1e-3, 2e-3, 3e-3, 4e-3, 90e-3])\n"
        "    benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=5, iterations=1)\n"
    )
    out = tmp_path / "out.json"
    done = run_benchmarks(
        str(tmp_path), f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), f"--benchmark-json={out}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stats = json.loads(out.read_text())["benchmarks"][0]["stats"]
    assert stats["median"] == pytest.approx(3e-3)
    assert (stats["min"], stats["max"]) == (pytest.approx(1e-3), pytest.approx(90e-3))
    assert stats["rounds"] == 5


def test_wall_timing_gives_the_time_of_one_launch(monkeypatch):
    """Launches of 3 ms and a wait of 4 ms at the end, by a host clock that only they move."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    timing = wall_timing(lambda: spend(3e-3), [()], lambda: spend(4e-3), min_seconds=21e-3)
    assert timing.launches == 3  # one launch and its wait took 7 ms
    assert timing.seconds() == pytest.approx((3 * 3e-3 + 4e-3) / 3)


@pytest.mark.parametrize(
    ("nbytes", "cache", "sets"), [(100, 1000, 20), (2000, 1000, 1), (1, 10**9, clock.MAX_LAUNCHES), (0, 10, 1)]
)
def test_inputs_rotate_over_twice_the_cache(nbytes, cache, sets):
    assert input_sets(nbytes, cache) == sets


def test_launches_are_whole_turns_over_the_sets_and_long_enough_for_events():
    for once, sets in ((1e-6, 7), (5e-4, 3), (1.0, 4)):
        launches = launches_for(once, sets)
        assert launches % sets == 0
        assert launches * once >= clock.MIN_ROUND_SECONDS or launches > clock.MAX_LAUNCHES - sets


# --- checks --------------------------------------------------------------------------------------------------------


def test_a_wrong_kernel_fails_its_benchmark_and_gets_no_figure(tmp_path):
    """The same benchmark with and without a plugin that makes `exit_route` put one row in a wrong place."""
    selected = ("benchmarks/test_token_routing.py", "-k", "enter_and_exit and ours and eager and both")
    right, wrong = tmp_path / "right.json", tmp_path / "wrong.json"
    done = run_benchmarks(*selected, f"--benchmark-json={right}")
    assert done.returncode == 0, done.stdout
    assert len(json.loads(right.read_text())["benchmarks"]) == 1
    done = run_benchmarks(*selected, f"--benchmark-json={wrong}", "-p", "tests.benchmarks.wrong_kernel")
    assert done.returncode == 1, done.stdout
    assert "relative error" in done.stdout
    assert "what was measured" not in done.stdout
    assert not wrong.exists() or not wrong.read_text() or not json.loads(wrong.read_text())["benchmarks"]


def test_rows_whose_time_is_spent_are_skipped_by_name(monkeypatch):
    monkeypatch.setenv("PRX_BENCH_SECONDS", "0")
    done = run_benchmarks("benchmarks/test_token_routing.py", "-k", "sample_keep")
    assert done.returncode == 0, done.stdout
    assert "the 0 s that PRX_BENCH_SECONDS gives this run are spent" in done.stdout
    assert "what was measured" not in done.stdout


def test_result_files_can_be_compared_and_read_back(tmp_path):
    selected = ("benchmarks/test_token_routing.py", "-k", "sample_keep")
    result = tmp_path / "result.json"
    done = run_benchmarks(*selected, f"--benchmark-json={result}")
    assert done.returncode == 0, done.stdout
    again = run_benchmarks(*selected, f"--benchmark-compare={result}", f"--benchmark-storage={tmp_path}")
    assert again.returncode == 0, again.stdout
    assert "(NOW)" in again.stdout
    content = json.loads(result.read_text())
    assert {"commit", "torch", "packages", "host_cpu"} <= set(content["machine_info"])
    rows, ceilings = summary.from_json(result)
    assert {row.way for row in rows} == {"ours", "rand + argsort + sort"}
    assert {row.how for row in rows} == {CPU_NOTE}
    assert ceilings.copy_bytes_per_second > 1e6
    assert any(CPU_NOTE in line for line in summary.lines(rows, ceilings))


def test_a_file_without_rows_is_no_result_file(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"benchmarks": [{"stats": {}}], "ceilings": None}))
    with pytest.raises(ValueError, match="is no result file"):
        summary.from_json(path)


def test_errors_are_relative_and_nan_never_passes():
    expected = torch.full((4,), 2.0)
    assert passes.relative_error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-4)
    assert passes.relative_error(torch.zeros(4), torch.zeros(4)) == 0.0
    assert passes.relative_error(torch.full((4,), float("nan")), expected) == float("inf")
    assert passes.relative_error(torch.full((4,), float("nan")), torch.zeros(4)) == float("inf")
    assert passes.relative_error(torch.zeros(5), expected) == float("inf")


def test_passes_give_the_gradients_of_the_product_rule():
    def function(x, y):
        return x * y, x + 1

    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    run, arguments = passes.prepare(function, "backward", (x, y))
    first, second = passes.incoming_gradients([x, x])
    assert torch.allclose(run(*arguments)[0], first * y + second)
    assert torch.allclose(run(*arguments)[0], first * y + second), "a second run of the same graph"
    run, arguments = passes.prepare(function, "both", (x, y))
    product, plus, gradient = run(*arguments)
    assert torch.equal(product, x * y)
    assert torch.equal(plus, x + 1)
    assert torch.allclose(gradient, first * y + second)


# --- summary -------------------------------------------------------------------------------------------------------

ROW = Row(
    op="op", case="case", which="both", way="ours", clock="device", ours=True, seconds=2e-3, spread=1e-5,
    nbytes=4e9, flop=8e11, peak_bytes=3 * 2**20, launches=4, how="graph", error=1.5e-3,
)  # fmt: skip


def test_summary_arithmetic_on_a_known_case():
    """4 GB and 0.8 TFLOP in 2 ms: 2,000 GB/s and 400 TFLOP/s; the floor is 1 ms (bytes) against 0.8 ms (operations)."""
    ceilings = Ceilings(4e12, 1e15, "bfloat16")
    ours, faster_ours, peer = (
        ROW,
        replace(ROW, way="ours 2", seconds=1.6e-3),
        replace(ROW, way="x", ours=False, seconds=8e-3),
    )
    rows = summary.cells([ours, faster_ours, peer], ceilings)
    assert rows[0] == ("ours", "2 ms", "0.5%", "2000", "400", "50.0%", "-", "3.0 MiB", "1.5e-03", "graph")
    assert rows[1][5] == "62.5%"
    assert rows[2][6] == "5.00x"
    assert ceilings.floor_seconds(4e9, 8e11) == pytest.approx(1e-3)
    assert ceilings.floor_seconds(1e9, 8e11) == pytest.approx(0.8e-3)


def test_a_peer_that_wins_is_shown_as_such_and_cpu_rows_show_no_rates():
    ceilings = Ceilings(4e12, 1e15, "bfloat16")
    rows = summary.cells([ROW, replace(ROW, way="peer", ours=False, seconds=1e-3)], ceilings)
    assert rows[1][6] == "0.50x"
    (row,) = summary.cells([replace(ROW, clock="cpu", how=CPU_NOTE)], ceilings)
    assert row[2:8] == ("-",) * 6
    assert row[-1] == CPU_NOTE


def test_a_step_shows_pictures_a_second_and_both_its_mfus():
    """100 and 150 TFLOP in 0.5 s are 20 % and 30 % of 1,000 TFLOP/s."""
    step = replace(ROW, which="step", seconds=0.5, nbytes=0.0, flop=150e12, denoiser_flop=100e12, images=32)
    (row,) = summary.cells([step], Ceilings(4e12, 8e14, "bfloat16", 1e15))
    assert row[3:6] == ("64", "20.0% (30.0%)", "37.5%")
    (row,) = summary.cells([step], Ceilings(4e12, 8e14, "bfloat16"))
    assert row[3:6] == ("64", "-", "37.5%")
    assert "images/s" in " ".join(summary.lines([step], Ceilings(4e12, 8e14, "bfloat16")))


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.5 s"), (0.0123456, "12.35 ms"), (4.2e-5, "42 us"), (3e-8, "30 ns")]
)
def test_durations_have_four_digits(seconds, text):
    assert summary.duration(seconds) == text


# --- peers ---------------------------------------------------------------------------------------------------------


def test_missing_peers_say_why():
    assert peers.PEERS["plain"].missing() is None
    assert "is not installed (PyPI: no-such-thing)" in str(Peer("x", "y", "no_such_module", "no-such-thing").missing())
    assert "is not installed" in str(Peer("x", "y", "no_such_package.inner", "no-such-thing").missing())
    assert "needs torch.optim.NoSuch" in str(Peer("x", "y", torch_attribute="optim.NoSuch").missing())
    if not torch.cuda.is_available():
        assert peers.PEERS["varlen"].missing() == "varlen needs a CUDA device"
    with pytest.raises(ValueError, match="no peer 'nobody' is declared"):
        peers.require("nobody")


def test_flash_attn_4_alone_is_not_taken_for_flash_attn(tmp_path, monkeypatch):
    """Both make a package `flash_attn`."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    for folder in (tmp_path / "flash_attn", tmp_path / "flash_attn" / "cute"):
        (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert "flash-attn is not installed" in str(peers.PEERS["flash-attn"].missing())
    assert "is not installed" not in str(peers.PEERS["flash-attn-4"].missing())
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


# --- traffic -------------------------------------------------------------------------------------------------------


def test_eager_traffic_counts_what_each_op_reads_and_writes():
    x, index = torch.randn(4, 8, 16), torch.arange(4)[None, :, None].expand(4, 4, 16)
    u = x.numel() * 4
    for function, expected in (
        (lambda: x + x.clone(), 5 * u),  # clone 2u, sum 3u
        (lambda: x[:, :4].mT, 0),
        (lambda: x.gather(1, index), u + 4 * 8),  # half of x read, half written, four indices
        (lambda: x.new_zeros(x.shape), u),
    ):
        with EagerTraffic() as traffic:
            function()
        assert traffic.nbytes == expected
