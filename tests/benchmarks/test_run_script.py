"""`run_h200.sh` with a stand-in for python: parts, limits, resuming; and the profile's arithmetic."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import first_step, sizes
from benchmarks.profile_step import kind_of, summarise

ROOT = Path(__file__).resolve().parents[2]

# Writes what each part's program would write, logs its arguments, and fails where FAIL is among them: benchmarks then
# without rows, or with ROWS. MISSING is a module that it does not have.
STAND_IN = """#!/usr/bin/env bash
echo "$*${NOTE:+ PRX_BENCH_SECONDS=$PRX_BENCH_SECONDS}" >> "$CALLS"
case "$*" in *"'${MISSING:-nothing}'"*) exit 1 ;; esac
for word in "$@"; do
  case "$word" in --benchmark-json=*) echo "${ROWS:-}" > "${word#--benchmark-json=}" ;; esac
done
case "$*" in *"${FAIL:-nothing}"*) exit 3 ;; esac
case "$1 $2" in "-m benchmarks.summary") grep -q row "$3" || exit 1 ;; esac
case "$*" in *profile_step*) echo '{}' > "$OUTPUT/profile-512.json" ;; esac
echo "last line"
"""


def run(tmp_path: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    out = tmp_path / "out"
    variables = {
        **os.environ,
        "PYTHON": str(python),
        "CALLS": str(tmp_path / "calls"),
        "OUTPUT": str(out),
        **environment,
    }
    command = ["bash", "benchmarks/run_h200.sh", str(out), *parts]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)


def calls(tmp_path: Path) -> list[str]:
    """The parts' programs that ran."""
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line for line in lines if "benchmarks.summary" not in line and not line.startswith("-c ")]


def test_all_parts_run_once_and_are_not_repeated(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {
        "smoke.txt",
        "first-step.txt",
        "gpu-tests.txt",
        "kernels.json",
        "step.json",
        "profile-512.json",
        "train.txt",
    }
    assert results <= {path.name for path in (tmp_path / "out").iterdir()}
    first = calls(tmp_path)
    assert len(first) == 7
    assert "-m gpu" in first[0]
    assert first[0].endswith("tests/gpu/test_smoke.py")
    assert first[1] == "-m benchmarks.first_step"
    assert first[2].endswith("tests --ignore tests/gpu/test_smoke.py")
    assert "benchmarks/test_newton_schulz.py benchmarks/test_muon.py benchmarks/test_token_routing.py" in first[3]
    assert "-k not wall" in first[3]
    assert "benchmarks/test_step.py" not in first[3]
    assert "benchmarks/test_step.py" in first[4]
    (tmp_path / "out" / "step.json").unlink()
    again = run(tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 6
    later = calls(tmp_path)[len(first) :]
    assert len(later) == 1
    assert "benchmarks/test_step.py" in later[0]


def test_a_failing_part_is_named_keeps_no_result_and_does_not_stop_the_others(tmp_path):
    done = run(tmp_path, "kernels", "train", FAIL="benchmark-only")
    assert done.returncode == 1
    assert "kernels: FAILED with code 3, see kernels.log" in done.stdout
    assert not (tmp_path / "out" / "kernels.json").exists()
    assert (tmp_path / "out" / "train.txt").exists()


def test_a_smoke_part_that_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    done = run(tmp_path, "smoke", "first-step", "gpu-tests", FAIL="test_smoke.py")
    assert done.returncode == 1
    assert "smoke: FAILED with code 3, see smoke.log" in done.stdout
    assert not (tmp_path / "out" / "smoke.txt").exists()
    assert (tmp_path / "out" / "first-step.txt").exists()
    assert len(calls(tmp_path)) == 3


def test_rows_that_were_measured_outlive_those_that_failed(tmp_path):
    done = run(tmp_path, "kernels", FAIL="benchmark-only", ROWS="rows")
    assert done.returncode == 1
    assert "kernels: FAILED with code 3, see kernels.log" in done.stdout
    assert "kernels: what was measured is kept" in done.stdout
    assert (tmp_path / "out" / "kernels.json").read_text() == "rows\n"


def test_what_a_missing_package_skips_is_said_and_is_no_failure(tmp_path):
    done = run(tmp_path, "profile", "train", MISSING="tyro")
    assert done.returncode == 0, done.stdout
    assert "train: skipped, tyro is not installed; carry its wheel" in done.stdout
    assert not (tmp_path / "out" / "train.txt").exists()
    done = run(tmp_path, "profile", "step", MISSING="lpips")
    assert "step with teachers: skipped, lpips is not installed" in done.stdout
    assert (tmp_path / "out" / "step.json").exists()


def test_wrong_use_is_a_sentence(tmp_path):
    assert run(tmp_path, "everything").returncode == 2
    done = subprocess.run(["bash", "benchmarks/run_h200.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_the_usual_parts_limits_add_up_to_less_than_nine_minutes() -> None:
    words = (ROOT / "benchmarks" / "run_h200.sh").read_text()
    limits = {name: int(limit) for name, limit in re.findall(r"(?:part|bench) ([a-z-]+) (\d+) ", words)}
    usual = re.search(r"parts=\((smoke first-step gpu-tests.*)\)", words)
    assert usual is not None
    assert sum(limits[name] for name in usual[1].split()) < 540
    assert max(limits.values()) < 540
    rests = re.findall(r"bench ([a-z-]+) (\d+) (\d+) ", words)
    assert {name for name, _, _ in rests} == {"kernels", "all-kernels", "step", "steps", "pointwise"}
    assert all(15 <= int(rest) < int(limit) for _, limit, rest in rests)


@pytest.mark.parametrize(("without", "steps"), [("nothing", []), ("cuda.is_available", ["20", "40"])])
def test_train_is_short_without_a_gpu_and_takes_more_words(tmp_path: Path, without: str, steps: list[str]) -> None:
    done = run(tmp_path, "train", FAIL=without, PRX_TRAIN="--train.steps 40" if steps else "")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = calls(tmp_path)
    assert re.findall(r"--train.steps (\d+)", line) == steps


def test_benchmarks_are_told_how_long_they_may_begin_rows(tmp_path: Path) -> None:
    run(tmp_path, "step", NOTE="1")
    (line,) = [line for line in calls(tmp_path) if "benchmarks/test_step.py" in line]
    assert line.endswith("PRX_BENCH_SECONDS=120")


def test_a_part_ends_at_its_limit_and_keeps_no_result(tmp_path: Path) -> None:
    script = (ROOT / "benchmarks" / "run_h200.sh").read_text()
    (tmp_path / "benchmarks").mkdir()
    short = re.sub(r"part train \d+ ", "part train 1 ", script)
    (tmp_path / "benchmarks" / "run_h200.sh").write_text(short)
    sleeper = tmp_path / "python"
    sleeper.write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || exec sleep 30\n')
    sleeper.chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / "run_h200.sh"), str(tmp_path / "out"), "train"],
        env={**os.environ, "PYTHON": str(sleeper)}, capture_output=True, text=True, timeout=25,
    )  # fmt: skip
    assert done.returncode == 1
    assert "train: FAILED with code 124" in done.stdout
    assert not (tmp_path / "out" / "train.txt").exists()


def test_profile_sums_time_by_kernel_and_kind_for_one_step():
    def event(key: str, microseconds: float, count: int, device: str = "DeviceType.CUDA") -> SimpleNamespace:
        return SimpleNamespace(
            key=key, self_device_time_total=microseconds, self_cpu_time_total=1.0, count=count, device_type=device
        )

    events = [
        event("sm90_xmma_gemm_bf16", 800.0, 8),
        event("triton_poi_fused_add", 200.0, 4),
        event("aten::mm", 500.0, 2, "DeviceType.CPU"),
        event("denoiser", 900.0, 2),
    ]
    events[-1].is_user_annotation = True  # a span of the kernels above, as a trace shows it beside them
    result = summarise(events, True, 2)
    assert result["busy_us"] == 500.0
    assert result["kinds_us"] == {"matrix": 400.0, "other memory-bound": 100.0}
    assert result["kernels"][0] == {"kernel": "sm90_xmma_gemm_bf16", "us": 400.0, "launches": 4.0}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256", "matrix"),
        ("void flash_fwd_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "matrix"),
        ("_sym_gemm_tma_kernel", "matrix"),
        ("triton_poi_fused__scaled_dot_product_efficient_attention_mm_3", "other memory-bound"),
        ("Memcpy DtoD", "copies and memory sets"),
        ("triton_red_fused_native_layer_norm", "other memory-bound"),
    ],
)
def test_kernels_are_sorted_by_name(kernel, kind):
    assert kind_of(kernel) == kind


# --- the first step, and sizes that fit --------------------------------------------------------------------------


def test_the_first_step_runs_and_finds_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lpips")
    assert first_step.run(first_step.small_case()) == []
    assert re.search(r"one step at 64 px x 2, .*: loss \d+\.\d+, ", capsys.readouterr().out)


def test_a_first_step_names_what_it_did_not_move_and_what_it_broke() -> None:
    names, before = ["a", "b", "c", "d"], [1.0, 2.0, 3.0, 0.0]
    assert first_step.wrong_weights(names, before, [1.5, 2.5, 3.5, 0.1]) == []
    assert first_step.wrong_weights(names, before, [1.0, float("nan"), float("inf"), 0.1]) == [
        "the step left 1 weights as they were: a",
        "2 weights are not finite: b, c",
    ]


@pytest.mark.parametrize(("gigabytes", "batches"), [(141, [32, 16]), (80, [16, 8]), (180, [32, 16])])
def test_a_gpu_of_eighty_gigabytes_has_half_of_the_pictures(gigabytes: int, batches: list[int]) -> None:
    stages = sizes.stages_that_fit(gigabytes * 10**9)
    assert [(case.size, case.batch, case.repa) for case in stages] == [
        (512, batches[0], True),
        (1024, batches[1], False),
    ]
