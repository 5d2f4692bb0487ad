"""What every data set of this package gives: an `Example` for a global sample position."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Substituted:
    """A sample that could not be read, and in whose place another was trained on."""

    position: int
    """Global sample position."""
    key: str
    """Names the sample that could not be read: file and row."""
    reason: str


@dataclass(frozen=True)
class Example:
    """One training pair."""

    image: NDArray[np.uint8]
    """(height, width, 3), uint8, RGB."""
    caption: str
    key: str
    """Names the sample in messages: file and row, or the parameters of a drawn picture."""
    substituted: Substituted | None = None
    """The sample in whose place this one stands, if so."""
    source: int | None = None
    """Which source of a mixture it is from; None where there is one."""


class Dataset(Protocol):
    """A deterministic map from a global sample position (0, 1, 2, … over all epochs) to an example."""

    def __getitem__(self, position: int) -> Example: ...
