"""Time of device work: CUDA events round a graph of launches, over inputs that do not fit the cache.

pytest-benchmark asks a timer before and after each round. `Clock` is that timer: it stands still except where a
measurement moves it, by the time of one launch. So each round is one launch's mean device time (or wall time, in rows
of its own), and nothing of the host's work, of the harness's or of pytest-benchmark's is in it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Any]
Inputs = Sequence[tuple[Any, ...]]

MIN_ROUND_SECONDS = 2e-3
"""Shortest graph replay: events resolve about half a microsecond, so a round is right to 0.03 %."""
MAX_LAUNCHES = 256
CACHE_FACTOR = 2.0
"""Inputs are rotated over at least this many times the L2 cache."""
MAX_INPUT_BYTES = 24 * 2**30
_WARM_UP = 3


class Clock:
    """A timer in seconds that stands still until `advance` moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock by a measured duration.

        Raises:
            ValueError: a duration that is negative or not finite; no figure comes of it.
        """
        if not 0.0 <= seconds < float("inf"):
            raise ValueError(f"a duration must be finite and not negative, got {seconds}")
        self.now += seconds


CLOCK = Clock()
"""The timer that `conftest.py` gives pytest-benchmark."""


@dataclass(frozen=True)
class Timing:
    """A function prepared for timing: `seconds()` is one round, the mean time of one launch."""

    seconds: Callable[[], float]
    launches: int
    """Launches a round."""
    how: str
    """"graph", or why not."""


def input_sets(nbytes: int, cache_bytes: int) -> int:
    """How many sets of inputs of `nbytes` to rotate, so that none is in the cache when its turn comes; one of none."""
    if nbytes == 0:
        return 1
    wanted = -(-int(CACHE_FACTOR * cache_bytes) // nbytes)
    affordable = max(1, MAX_INPUT_BYTES // nbytes)
    return max(1, min(wanted, affordable, MAX_LAUNCHES))


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts, each tensor once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors(values)}.values())


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)


@contextmanager
def side_stream() -> Iterator[None]:
    """Do device work on the one stream that is captured; nested uses are on the same.

    What a recorded backward is captured on has to be the stream of its forward: autograd runs it there, and a default
    stream cannot join a capture (pytorch issue 164302).
    """
    stream, before = _capture_stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@lru_cache(maxsize=1)
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def device_timing(run: Run, inputs: Inputs, *, graph: bool = True) -> Timing:
    """Prepare `run(*inputs[i])` for timing by CUDA events: a graph of launches, eager ones where none can be captured.

    Warm-up (compilation, cuBLAS handles, autograd's threads) happens here, outside of every round. Inputs with a
    recorded backward have to be made in `side_stream`.
    """
    with side_stream():
        for i in range(_WARM_UP):
            run(*inputs[i % len(inputs)])
        once = _event_seconds(lambda: run(*inputs[0]))
    torch.cuda.synchronize()
    launches, how = launches_for(once, len(inputs)), "eager launches: asked for"
    if graph:
        try:
            captured, seconds = _capture(run, inputs, launches)
            if seconds < MIN_ROUND_SECONDS / 2:  # the eager launch cost the host more than the device
                launches = launches_for(seconds / launches, len(inputs))
                captured, seconds = _capture(run, inputs, launches)
            return Timing(lambda: _replay_seconds(captured, seconds) / launches, launches, "graph")
        except RuntimeError as error:
            torch.cuda.synchronize()
            how = f"eager launches: {str(error).strip().splitlines()[0][:80]}"

    def launch_all() -> None:
        with side_stream():
            for i in range(launches):
                run(*inputs[i % len(inputs)])

    return Timing(lambda: _event_seconds(launch_all) / launches, launches, how)


def _capture(run: Run, inputs: Inputs, launches: int) -> tuple[torch.cuda.CUDAGraph, float]:
    """A graph of `launches` launches, and the seconds that it takes."""
    captured = torch.cuda.CUDAGraph()
    with side_stream(), torch.cuda.graph(captured, stream=_capture_stream()):
        for i in range(launches):
            run(*inputs[i % len(inputs)])
    captured.replay()
    torch.cuda.synchronize()
    return captured, _event_seconds(captured.replay)


def _replay_seconds(captured: torch.cuda.CUDAGraph, about: float) -> float:
    """Time of one replay; a short one begins while another runs, so that what its launch costs the host is hidden."""
    if about < 10 * MIN_ROUND_SECONDS:
        captured.replay()
    return _event_seconds(captured.replay)


def wall_timing(
    run: Run, inputs: Inputs, synchronize: Callable[[], None], *, min_seconds: float, warm: bool = False
) -> Timing:
    """Prepare `run` for timing by the host's clock, the cost of launching included; the device is waited for.

    `warm` says that it has run before and lasts longer than `min_seconds`: then it is not run here.
    """
    launches = 1
    if not warm:
        for _ in range(_WARM_UP):
            run(*inputs[0])
        synchronize()
        begin = time.perf_counter()
        run(*inputs[0])
        synchronize()
        once = time.perf_counter() - begin
        launches = max(1, min(MAX_LAUNCHES, round(min_seconds / max(once, 1e-9))))

    def seconds() -> float:
        begin = time.perf_counter()
        for i in range(launches):
            run(*inputs[i % len(inputs)])
        synchronize()
        return (time.perf_counter() - begin) / launches

    return Timing(seconds, launches, "wall")


def launches_for(once: float, sets: int) -> int:
    """Launches a round: whole turns over the input sets that last at least `MIN_ROUND_SECONDS`."""
    turns = -(-MIN_ROUND_SECONDS // max(once * sets, 1e-9))
    return sets * max(1, min(int(turns), MAX_LAUNCHES // sets))


def _event_seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3
