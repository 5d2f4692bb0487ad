"""Device timing on a pretended GPU: what is captured where, how long a round is, and what is left out of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks import clock
from benchmarks.clock import MIN_ROUND_SECONDS, device_timing

HOST_BOUND, ON_DEVICE, GRAPH_LAUNCH = 100e-6, 4e-6, 30e-6


class Pretended:
    """A GPU with a clock: a launch costs the host 100 us and the device 4 us, a graph on an idle device 30 us more."""

    def __init__(self) -> None:
        self.now, self.captured, self.current, self.refuse, self.idle = 0.0, -1, "default", False, True
        self.captured_on: list[str] = []

    def launch(self) -> None:
        if self.captured < 0:
            self.now += HOST_BOUND
            return
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captured += 1

    def replay(self, launches: int) -> None:
        self.now += (GRAPH_LAUNCH if self.idle else 0.0) + launches * ON_DEVICE
        self.idle = False

    def synchronize(self) -> None:
        self.idle = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    pretended = Pretended()

    class Stream(SimpleNamespace):
        def wait_stream(self, other: object) -> None:
            pass

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = pretended.now

        def synchronize(self) -> None:
            pretended.synchronize()

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) * 1e3

    class Graph:
        launches = 0

        def replay(self) -> None:
            pretended.replay(self.launches)

    @contextmanager
    def stream(which: SimpleNamespace) -> Iterator[None]:
        before, pretended.current = pretended.current, which.name
        yield
        pretended.current = before

    @contextmanager
    def graph(captured: Graph, stream: SimpleNamespace) -> Iterator[None]:
        pretended.captured_on += [pretended.current, stream.name]
        pretended.captured = 0
        try:
            yield
        finally:
            captured.launches, pretended.captured = pretended.captured, -1

    fakes = {
        "Stream": lambda: Stream(name="side"), "current_stream": lambda: Stream(name=pretended.current),
        "Event": Event, "CUDAGraph": Graph, "stream": stream, "graph": graph, "synchronize": pretended.synchronize,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(clock.torch.cuda, name, fake)
    clock._capture_stream.cache_clear()
    yield pretended
    clock._capture_stream.cache_clear()


def test_a_round_is_long_enough_and_holds_the_devices_time_alone(gpu: Pretended) -> None:
    timing = device_timing(gpu.launch, [(), (), ()])
    assert timing.how == "graph"
    assert timing.launches % 3 == 0
    assert timing.launches > MIN_ROUND_SECONDS / HOST_BOUND, "an eager launch's time must not decide"
    assert timing.launches == 255, "as many turns as MAX_LAUNCHES allows"
    assert timing.seconds() == pytest.approx(ON_DEVICE, rel=1e-6)
    assert set(gpu.captured_on) == {"side"}, "captured on the stream of the warm-up"
    assert gpu.current == "default"


def test_what_cannot_be_captured_is_launched_and_says_so(gpu: Pretended) -> None:
    gpu.refuse = True
    timing = device_timing(gpu.launch, [()])
    assert timing.how == "eager launches: operation not permitted when stream is capturing"
    assert timing.seconds() == pytest.approx(HOST_BOUND)
    gpu.refuse = False
    assert device_timing(gpu.launch, [()], graph=False).how == "eager launches: asked for"
