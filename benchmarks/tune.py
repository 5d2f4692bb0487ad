"""Which tiles symmetric products run with: every candidate checked and timed on the GPU at hand, and the table written.

python -m benchmarks.tune                # times, beside what counting says, and the rows that follow from them
python -m benchmarks.tune --write        # and puts these rows into prx_kernels/newton_schulz/symmetric_kernels.py
python -m benchmarks.tune --count        # without a GPU: what counting says (benchmarks/tiles.py)

Candidates are `symmetric_kernels.CANDIDATES`; tests hold each of them to the definition in Triton's interpreter and
build it ahead of time, so none that spills or is wrong comes here.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import tiles
from benchmarks.clock import device_timing
from benchmarks.roofline import H200_MATMUL
from prx_kernels import reference
from prx_kernels.launch import Config, capability
from prx_kernels.newton_schulz import symmetric_kernels as kernels

NAMES = ("_SMALL", "_HALF", "_WHOLE", "_TWO_BLOCKS", "_PAIR")
"""Of the candidates, in the table's file."""
LITTLE = 896
"""Rows of a matrix that a quarter of an H200 could hold: the first row of the table."""
BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)
ROUNDS = 7
TABLE = Path(kernels.__file__)
Case = tuple[int, int]  # matrices, n


def size_of(case: Case) -> int:
    """What the table is keyed on: tiles of 128 × 128 in the upper triangles of all matrices."""
    side = -(-case[1] // 128)
    return case[0] * side * (side + 1) // 2


def timed(case: Case, config: Config) -> float:
    """Seconds of R·Z + R on the GPU, the median of a few rounds, after its result was compared with the definition.

    Raises:
        SystemExit: the result is wrong.
    """
    batch, n = case
    R = torch.randn(batch, n, n, device="cuda", dtype=torch.float16) / n**0.5
    R = (R + R.mT) / 2
    out = torch.empty_like(R)

    def run() -> None:
        kernels._launch_tma(R, R, R, out, 0.5, 1.0, 0.0, False, config)

    run()
    truth = reference.sym_gemm(R[:1], R[:1], R[:1], alpha=0.5, beta=1.0)
    error = float((out[:1] - truth).norm() / truth.norm())
    if not error < 1e-3:  # one rounding to float16
        raise SystemExit(f"{config} is wrong by {error:.1e}: it must not be in CANDIDATES")
    seconds = device_timing(run, [()])
    return sorted(seconds.seconds() for _ in range(ROUNDS))[ROUNDS // 2]


def counted(case: Case, config: Config) -> float:
    """The same by counting."""
    return tiles.seconds(*case, case[1], config)


def rows(found: dict[Case, list[float]]) -> list[tuple[int, int]]:
    """Limit and candidate of each row: the quickest for every size, neighbours of one candidate together."""
    out: list[tuple[int, int]] = []
    for case in sorted(found, key=size_of):
        quickest = min(range(len(NAMES)), key=found[case].__getitem__)
        if out and out[-1][1] == quickest:
            out.pop()
        out.append((size_of(case), quickest))
    return [*out[:-1], (2**31 - 1, out[-1][1])]


def as_source(chosen: Sequence[tuple[int, int]]) -> str:
    """The rows as the table's file has them."""
    limits = ["2**31 - 1" if limit == 2**31 - 1 else str(limit) for limit, _ in chosen]
    return f"({', '.join(f'({limit}, {NAMES[i]})' for limit, (_, i) in zip(limits, chosen, strict=True))})"


def lines(found: dict[Case, list[float]], measure: str) -> list[str]:
    """A table of microseconds, the quickest marked, and what counting says of it."""
    head = f"{'matrices':>8} {'n':>5} " + " ".join(f"{name:>12}" for name in NAMES) + "   of the matrix rate"
    out = [f"µs of one product of n × n with n × n, {measure}", head]
    for case, times in found.items():
        quickest = min(times)
        cells = " ".join(f"{t * 1e6:>11.1f}{'*' if t == quickest else ' '}" for t in times)
        floor = size_of(case) * 2 * 128 * 128 * case[1] / H200_MATMUL
        out.append(f"{case[0]:>8} {case[1]:>5} {cells}   {floor / quickest:.0%}")
    return out


def main(arguments: Sequence[str]) -> int:
    """Time or count, print, and write if asked; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=1792, help="rows of the matrices")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="how many are multiplied together")
    parser.add_argument("--count", action="store_true", help="by counting, without a GPU")
    parser.add_argument("--write", action="store_true", help="put the rows into the table")
    asked = parser.parse_args(arguments)
    if min(asked.n, *asked.batches) < 1:
        parser.error("--n and --batches must be at least 1")
    if not asked.count and (not torch.cuda.is_available() or capability(torch.device("cuda")) != 90):
        parser.error("needs a GPU of compute capability 9.0, whose table this is; --count goes without")
    ask: Callable[[Case, Config], float] = counted if asked.count else timed
    cases = [(1, LITTLE), *((batch, asked.n) for batch in asked.batches)]
    found = {case: [ask(case, config) for config in kernels.CANDIDATES] for case in cases}
    print(*lines(found, "by counting" if asked.count else torch.cuda.get_device_name()), sep="\n")
    source = as_source(rows(found))
    print(f"_HOPPER = {source}")
    if asked.write:
        text = TABLE.read_text(encoding="utf-8")
        TABLE.write_text(re.sub(r"^_HOPPER = .*$", f"_HOPPER = {source}", text, flags=re.MULTILINE), encoding="utf-8")
        print(f"wrote {TABLE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
