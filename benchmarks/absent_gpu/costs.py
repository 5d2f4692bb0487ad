"""What launches would take on an H200: a floor from its measured ceilings, and what stated efficiencies make of it.

The ceilings are docs/recipe.md's, measured through PyTorch. The efficiencies are assumptions until an H200 has been
asked; they are printed with every table. Use predicted milliseconds to compare two forms of a step, not as its time.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.absent_gpu.recorder import Launch
from benchmarks.roofline import H200_COPY, H200_MATMUL


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the ceilings that are assumed to be reached."""

    product: float = 0.90
    convolution: float = 0.65
    attention: float = 0.50
    attention_backward: float = 0.40
    ours: float = 0.60
    """Matrix products of prx_kernels, but the symmetric ones: their tiles are counted (`benchmarks/tiles.py`)."""
    bandwidth: float = 0.85
    gap: float = 1e-6
    """Seconds between two launches."""
    shortest: float = 2e-6
    """Seconds that any kernel takes."""

    def sentence(self) -> str:
        """What is assumed, for the foot of a table."""
        return (
            f"Assumed: {H200_MATMUL / 1e12:.0f} TFLOP/s and {H200_COPY / 1e12:.1f} TB/s as ceilings; products at "
            f"{self.product:.0%}, convolutions {self.convolution:.0%}, attention {self.attention:.0%} (backward "
            f"{self.attention_backward:.0%}), our products {self.ours:.0%} (symmetric ones as their tiles count), "
            f"bytes {self.bandwidth:.0%}; "
            f"{self.gap * 1e6:g} µs between launches, at least {self.shortest * 1e6:g} µs each. Collectives and copies "
            "to the host: bytes only, no time."
        )


ASSUMED = Efficiencies()
_FREE_OF_TIME = ("host", "collective")


@dataclass
class Sum:
    """Launches together."""

    launches: int = 0
    nbytes: float = 0.0
    flop: float = 0.0
    floor: float = 0.0
    """Seconds, the larger of bytes and operations at the ceilings, launch by launch."""
    expected: float = 0.0
    """Seconds at the assumed efficiencies."""

    def add(self, launch: Launch, assumed: Efficiencies = ASSUMED) -> None:
        floor, expected = seconds(launch, assumed)
        self.launches += 1
        self.nbytes += launch.nbytes if launch.kind != "host" else 0.0
        self.flop += launch.flop
        self.floor += floor
        self.expected += expected

    def as_json(self) -> dict[str, Any]:
        """GB, TFLOP and milliseconds."""
        return {
            "launches": self.launches, "GB": round(self.nbytes / 1e9, 4), "TFLOP": round(self.flop / 1e12, 4),
            "floor_ms": round(self.floor * 1e3, 4), "expected_ms": round(self.expected * 1e3, 4),
        }  # fmt: skip


def seconds(launch: Launch, assumed: Efficiencies = ASSUMED) -> tuple[float, float]:
    """(floor, expected) of one launch."""
    if launch.kind in _FREE_OF_TIME:
        return 0.0, 0.0
    floor = max(launch.nbytes / H200_COPY, launch.flop / H200_MATMUL)
    share: float = getattr(assumed, launch.kind, assumed.product) if launch.share is None else launch.share
    if launch.kind == "attention" and "backward" in launch.name:
        share = assumed.attention_backward
    moved = launch.nbytes / (H200_COPY * assumed.bandwidth)
    return floor, max(moved, launch.flop / (H200_MATMUL * share), assumed.shortest) + assumed.gap


def total(launches: Iterable[Launch]) -> Sum:
    """All of them."""
    found = Sum()
    for launch in launches:
        found.add(launch)
    return found


def grouped(launches: Iterable[Launch], key: Callable[[Launch], tuple[str, ...]]) -> dict[tuple[str, ...], Sum]:
    """Sums by a key, the dearest first."""
    found: dict[tuple[str, ...], Sum] = {}
    for launch in launches:
        found.setdefault(key(launch), Sum()).add(launch)
    return dict(sorted(found.items(), key=lambda item: (-item[1].expected, item[0])))


def by_part_and_kind(launch: Launch) -> tuple[str, ...]:
    return launch.part, launch.kind


def by_kernel(launch: Launch) -> tuple[str, ...]:
    """Part, kind, name without Inductor's number, shapes."""
    return launch.part, launch.kind, plain_name(launch), launch.shapes


def plain_name(launch: Launch) -> str:
    """The name that stays when Inductor numbers its kernels anew."""
    return re.sub(r"_\d+$", "", launch.name) if launch.kind == "inductor" else launch.name


def assumptions() -> dict[str, Any]:
    """For a JSON file."""
    return {"matmul_flop_per_s": H200_MATMUL, "copy_bytes_per_s": H200_COPY, **asdict(ASSUMED)}
