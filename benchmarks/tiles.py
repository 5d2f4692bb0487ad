"""What symmetric products would take on an H200 by counting: tiles a multiprocessor, shared memory, epilogues.

No time is measured here. `benchmarks/tune.py` measures, and prints these beside it.
"""

from benchmarks.roofline import H200_COPY, H200_MATMUL
from prx_kernels.launch import Config
from prx_kernels.newton_schulz.symmetric_kernels import CANDIDATES, tiles_of

MULTIPROCESSORS = 132
SHARED_BYTES = 232_448
"""Of shared memory that the blocks of a multiprocessor have together (CUDA C++ Programming Guide, capability 9.0)."""
SHARED_RATE = 128
"""Bytes of shared memory that a multiprocessor reads or writes a clock."""
MATRIX_RATE = 4096
"""Half-precision operations a clock and multiprocessor: 989 TFLOP/s at 1.83 GHz on 132 of them (H100 data sheet)."""
WIDEST = 128
"""Columns of one product of a warp group here: wider accumulators are cut in two."""


def share(config: Config) -> float:
    """Share of the matrix units' rate that shared memory allows: each product reads both operands, each tile is filled.

    A warp group multiplies 64 rows with up to 128 columns at a time and reads both from shared memory, where TMA writes
    every tile once.
    """
    rows, cols = config.options["ROWS"], config.options["COLS"]
    width = min(cols, WIDEST)
    reads = (rows // 64) * (cols // width) * (64 + width) * 2
    fills = (rows + cols) * 2
    return min(1.0, (2 * rows * cols / MATRIX_RATE) / ((reads + fills) / SHARED_RATE))


def beside(config: Config) -> int:
    """Blocks that a multiprocessor holds at once, by shared memory; registers allow as many for all candidates."""
    rows, cols, depth = (config.options[name] for name in ("ROWS", "COLS", "DEPTH"))
    return SHARED_BYTES // (config.num_stages * (rows + cols) * depth * 2 + 1024)


def seconds(batch: int, n: int, k: int, config: Config) -> float:
    """Of one launch: the fullest multiprocessor's tiles at `share` of an H200's matrix rate, and their epilogues.

    An epilogue reads C and writes two tiles at a multiprocessor's part of the bandwidth. With two blocks beside one
    another only the last one shows.
    """
    rows, cols = config.options["ROWS"], config.options["COLS"]
    fullest = -(-batch * tiles_of(n, config) // MULTIPROCESSORS)
    products = 2 * rows * cols * k / (H200_MATMUL / MULTIPROCESSORS * share(config))
    epilogue = 3 * rows * cols * 2 / (H200_COPY / MULTIPROCESSORS)
    return fullest * products + epilogue * (fullest if beside(config) == 1 else 1)


def best(batch: int, n: int, k: int) -> Config:
    """The candidate of the least counted time."""
    return min(CANDIDATES, key=lambda config: seconds(batch, n, k, config))


def efficiency(batch: int, n: int, k: int, config: Config) -> float:
    """Share of an H200's matrix rate that a launch reaches by count; its operations are those of whole tiles."""
    rows, cols = config.options["ROWS"], config.options["COLS"]
    operations = 2 * rows * cols * k * batch * tiles_of(n, config)
    return operations / H200_MATMUL / seconds(batch, n, k, config)
