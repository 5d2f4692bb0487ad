"""Result files of the real schema with made-up figures, for tests of what is made of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.measure import CPU_NOTE, Row

ROW = Row(
    op="training step, all ingredients", case="512 px x 32, text 40% full", which="step", way="ours", clock="wall",
    ours=True, seconds=0.1, spread=1e-3, nbytes=0.0, flop=50e12, peak_bytes=60 * 2**30, launches=10,
    how="wall", error=1e-2, images=32, denoiser_flop=25e12,
)  # fmt: skip
KERNEL = replace(
    ROW, op="enter + exit route", case="B32 N256 C1792", which="both", way="ours, compiled", clock="device",
    seconds=50e-6, spread=1e-6, nbytes=176e6, flop=0.0, peak_bytes=2**20, how="graph", error=0.0, images=0,
    denoiser_flop=0.0,
)  # fmt: skip
SECOND = "1024 px x 16, text 40% full"


def rows() -> list[Row]:
    """Both stages by us and by the baseline, once faster and once slower than it; a ladder; a kernel that loses."""
    made = [
        ROW,
        replace(ROW, way="PRX way, compiled", ours=False, seconds=0.3),
        replace(ROW, case=SECOND, seconds=0.2, images=16),
        replace(ROW, case=SECOND, way="PRX way, compiled", ours=False, seconds=0.15, images=16),
    ]
    for case, seconds in ((ROW.case, 0.08), (SECOND, 0.12)):
        made.append(replace(ROW, op="training step, without optimizer", case=case, seconds=seconds))
    for way, seconds in (("plain, eager", 0.2), ("+ compiled", 0.15), ("+ our model", 0.05), ("+ teachers", 0.09)):
        made.append(replace(ROW, op="training step, built up", way=way, ours=False, seconds=seconds))
    made += [KERNEL, replace(KERNEL, way="PRX, compiled", ours=False, seconds=25e-6)]
    newton = "Newton-Schulz, Jordan, 5 steps"
    made.append(replace(KERNEL, op=newton, case="all 112 of PRX", way="ours", nbytes=1e9, flop=47.9e12, seconds=36e-3))
    return made


def write(path: Path, made: list[Row] | None = None, *, on_gpu: bool = True) -> Path:
    """A file as `--benchmark-json` writes it."""
    chosen = rows() if made is None else made
    if not on_gpu:
        chosen = [replace(row, clock="cpu", how=CPU_NOTE) for row in chosen]
    content = {
        "machine_info": {"gpu": {"name": "Synthetic GPU"} if on_gpu else None, "torch": "2.15", "commit": "0123456789"},
        "ceilings": {
            "copy_bytes_per_second": 4e12, "matmul_flop_per_second": 8e14, "matmul_dtype": "bfloat16",
            "data_sheet_flop_per_second": 1e15,
        },
        "benchmarks": [
            {"name": row.way, "stats": {"median": row.seconds, "iqr": row.spread}, "extra_info": asdict(row)}
            for row in chosen
        ],
    }  # fmt: skip
    if not on_gpu:
        del content["machine_info"]["gpu"]
    path.write_text(json.dumps(content))
    return path
