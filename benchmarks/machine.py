"""The machine that a figure was measured on, and its two ceilings, measured in the same run."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import device_timing, wall_timing
from train.run.plan import peak_flops

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = (
    *("triton", "diffusers", "timm", "flash-attn", "flash-attn-4", "muon-fsdp2", "gram-newton-schulz"),
    *("liger-kernel", "nvidia-cutlass-dsl", "pytest-benchmark"),
)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured: both bound every op from below."""

    copy_bytes_per_second: float
    """Bytes read plus bytes written by one large device copy."""
    matmul_flop_per_second: float
    """One large matrix product on random data in `matmul_dtype`, two operations a multiply-add."""
    matmul_dtype: str
    data_sheet_flop_per_second: float | None = None
    """Dense bf16 rate that the vendor names, which MFU is a share of; None where it is not known."""

    def floor_seconds(self, nbytes: float, flop: float) -> float:
        """The larger of both times: no implementation that moves these bytes and does these operations is faster."""
        return max(nbytes / self.copy_bytes_per_second, flop / self.matmul_flop_per_second)


def device() -> torch.device:
    """The device of all benchmarks: the current CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_ceilings(rounds: int = 10) -> Ceilings:
    """Median bandwidth of a copy, and median rate of a matrix product, on random data (zeros run faster)."""
    on = device()
    gpu = on.type == "cuda"
    length, side, dtype = (2**30, 8192, torch.bfloat16) if gpu else (2**22, 256, torch.float32)
    source = torch.empty(length, dtype=torch.uint8, device=on).random_()
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), rounds)
    left, right = (torch.randn(side, side, device=on).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    matmul = _median(lambda: torch.mm(left, right, out=product), rounds)
    return Ceilings(2.0 * length / copy, 2.0 * side**3 / matmul, str(dtype).removeprefix("torch."), peak_flops(on))


def _median(run: Any, rounds: int) -> float:
    if device().type == "cuda":
        timing = device_timing(run, [()])
    else:
        timing = wall_timing(run, [()], lambda: None, min_seconds=2e-3)
    return sorted(timing.seconds() for _ in range(rounds))[rounds // 2]


def cache_bytes() -> int:
    """Size of the L2 cache; 0 on a CPU, where rows are no results."""
    return torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0


def describe() -> dict[str, Any]:
    """Fields that a result file holds on the machine: device, driver, clocks, cache, packages, commit."""
    facts: dict[str, Any] = {
        "host_cpu": _cpu_name(),
        "host_cores": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            **_driver(),
        }
    return facts


def commit() -> str:
    """Commit of this checkout, with "+changes" where it was edited; `PRX_COMMIT` where git does not know."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        return head + ("+changes" if _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PRX_COMMIT", "unknown")


def _driver() -> dict[str, str]:
    """Driver, clocks (MHz) and power limit as nvidia-smi reads them; nothing is changed."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    try:
        index = str(torch.cuda.current_device())
        row = _output("nvidia-smi", "-i", index, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, (value.strip() for value in row.splitlines()[0].split(",")), strict=False))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
