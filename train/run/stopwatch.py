"""How long the named parts of a step take on the device, without ever waiting for it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Spans of a step by name: CUDA events on a GPU, the host's clock on a CPU; named in a profiler's trace too.

    Read it where the device has been waited for anyway: events of steps still under way would be waited for.

    Args:
        device: what is measured.
        nvtx: mark the spans for Nsight Systems.
    """

    def __init__(self, device: torch.device, *, nvtx: bool = False) -> None:
        self.on_gpu, self.nvtx = device.type == "cuda", nvtx and device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure what is launched inside."""
        if self.nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            with torch.profiler.record_function(name), self._measured(name):
                yield
        finally:
            if self.nvtx:
                torch.cuda.nvtx.range_pop()

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        if not self.on_gpu:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def read(self, steps: int) -> dict[str, float]:
        """Milliseconds a step of every span since the last reading: "time/<name>_ms"."""
        for name, begin, end in self._events:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) * 1e-3
        self._events.clear()
        found = {f"time/{name}_ms": 1e3 * spent / max(steps, 1) for name, spent in self._seconds.items()}
        self._seconds.clear()
        return found
