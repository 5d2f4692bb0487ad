"""One row: check the function against its reference, then time it. A wrong result gets no figure."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, passes
from benchmarks.clock import CLOCK, Timing, device_timing, input_sets, side_stream, tensor_bytes, tensors, wall_timing
from benchmarks.passes import Which
from benchmarks.roofline import Cost

CPU_NOTE = "CPU, not a result"
ROUNDS = {"device": 25, "wall": 10, "cpu": 3}


@dataclass(frozen=True)
class Row:
    """What the summary shows of one timed function."""

    op: str
    case: str
    which: str
    way: str
    clock: str
    """"device" (CUDA events), "wall" (host clock, on a GPU), or "cpu"."""
    ours: bool
    seconds: float
    """Median of the rounds, for one launch."""
    spread: float
    """Interquartile range of the rounds, in seconds."""
    nbytes: float
    flop: float
    peak_bytes: int | None
    """Device memory that one run took at its peak beyond its inputs."""
    launches: int
    how: str
    error: float
    """Largest relative error of the outputs against the reference."""
    images: int = 0
    """Pictures of a training step; `flop` are those of all its parts then, and memory is all that is allocated."""
    denoiser_flop: float = 0.0
    """Operations of a training step's denoiser alone."""

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.which, self.clock


class Measure:
    """The fixture `measure`: call it once in a benchmark."""

    def __init__(self, benchmark: Any, clock: str, rows: list[Row]) -> None:
        self.benchmark, self.clock, self.rows = benchmark, clock, rows
        self.device = machine.device()

    def __call__(
        self,
        *,
        op: str,
        case: str,
        way: str,
        function: Callable[..., Any],
        inputs: Callable[[int], tuple[Any, ...]],
        reference: Callable[..., Any] | None = None,
        verify: Callable[[Callable[..., Any], tuple[Any, ...]], float] | None = None,
        which: Which = "forward",
        cost: Cost,
        tolerance: float,
        ours: bool = False,
        parameters: Sequence[Tensor] = (),
        graph: bool = True,
        repeat: int = 1,
        images: int = 0,
        denoiser_flop: float = 0.0,
    ) -> None:
        """Check, time and note one row.

        Args:
            op, case, way: what is done, on which size, by whom; rows of one op, case and pass are compared.
            function: what is timed, on the arguments that `inputs(seed)` makes (fresh random ones for every seed).
            reference: the same function in plain PyTorch; it is run on float64 copies of the inputs.
            verify: instead of a reference: takes the prepared function and its arguments, gives the error.
            which: the pass, see `passes.prepare`.
            cost: bytes and operations that the op needs at least (not what this way happens to move).
            tolerance: largest relative error, `‖out - ref‖ / ‖ref‖`, of any output.
            ours: whether this is the project's own, which peers are compared with.
            parameters: tensors that `function` depends on beside its arguments.
            graph: False for functions that synchronise with the host; the row then says so.
            repeat: how often `function` does the op in one call; times are of one.
            images, denoiser_flop: of a training step, see `Row`.

        Raises:
            AssertionError: the result is wrong; nothing is timed or shown then.
        """
        # What is captured as a graph has to be recorded on the stream of the capture.
        with side_stream() if self.clock == "device" and graph else nullcontext():
            run, arguments = passes.prepare(function, which, inputs(0), parameters=parameters)
            error = self._error(run, arguments, reference, verify, which, inputs)
            assert error <= tolerance, f"{op}, {case}, {which}, {way}: relative error {error:.3g} exceeds {tolerance:g}"
            peak = self._peak(run, arguments, whole=which == "step")
            timing = self._timing(run, function, inputs, arguments, which, parameters, graph, warm=repeat > 1)
        self.benchmark.group = f"{op} | {case} | {which} | {self.clock}"
        rounds = max(3, ROUNDS[self.clock] // repeat)
        self.benchmark.pedantic(lambda: CLOCK.advance(timing.seconds() / repeat), rounds=rounds, iterations=1)
        if self.benchmark.stats is None:  # --benchmark-disable: checked, not timed
            return
        stats = self.benchmark.stats.stats
        how = CPU_NOTE if self.clock == "cpu" else timing.how
        row = Row(
            op, case, which, way, self.clock, ours, stats.median, stats.iqr, cost.nbytes, cost.flop, peak,
            timing.launches * repeat, how, error, images, denoiser_flop,
        )  # fmt: skip
        self.rows.append(row)
        self.benchmark.extra_info.update(asdict(row))

    def _error(
        self,
        run: Callable[..., Any],
        arguments: tuple[Any, ...],
        reference: Callable[..., Any] | None,
        verify: Callable[[Callable[..., Any], tuple[Any, ...]], float] | None,
        which: Which,
        inputs: Callable[[int], tuple[Any, ...]],
    ) -> float:
        if verify is not None:
            return verify(run, arguments)
        if reference is None:
            raise ValueError("a benchmark needs a reference or a verify function: nothing unchecked is timed")
        expected_run, expected_arguments = passes.prepare(reference, which, passes.as_reference(inputs(0)))
        actual, expected = list(tensors(run(*arguments))), list(tensors(expected_run(*expected_arguments)))
        if len(actual) != len(expected) or not actual:
            return float("inf")
        return max(passes.relative_error(a, e) for a, e in zip(actual, expected, strict=True))

    def _peak(self, run: Callable[..., Any], arguments: tuple[Any, ...], *, whole: bool) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = 0 if whole else torch.cuda.memory_allocated()
        result = run(*arguments)
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def _timing(
        self,
        run: Callable[..., Any],
        function: Callable[..., Any],
        inputs: Callable[[int], tuple[Any, ...]],
        arguments: tuple[Any, ...],
        which: Which,
        parameters: Sequence[Tensor],
        graph: bool,
        warm: bool,
    ) -> Timing:
        if self.clock == "cpu":
            return wall_timing(run, [arguments], lambda: None, min_seconds=0.0)
        sets = input_sets(tensor_bytes(inputs(0)), machine.cache_bytes())
        rotated = [arguments]
        for seed in range(1, sets):
            # `run` is the same for all: only what it is given differs.
            rotated.append(passes.prepare(function, which, inputs(seed), parameters=parameters)[1])
        if self.clock == "wall":
            return wall_timing(run, rotated, torch.cuda.synchronize, min_seconds=0.02, warm=warm)
        return device_timing(run, rotated, graph=graph)
