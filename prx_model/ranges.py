"""Which numbers a setting may be: said with the field, `Annotated[int, Range(1, 64)]`, and checked in one place.

No torch here: command lines are checked before it is imported.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above` or `below`, without that end itself. A tuple is meant part by part."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with a number, as the end of a sentence; None where nothing is."""
        if isinstance(value, tuple):
            return next((problem for part in value if (problem := self.problem(part))), None)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None  # None where a field may be that; other types are the parser's business
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number {self.text()}, got {value}"
        ends = ([self.low] if self.above else []) + ([self.high] if self.below else [])
        if self.low <= value <= self.high and value not in ends:
            return None
        if (self.low, self.high, self.above, self.below) == (0, 1, False, False):
            return f"is a share from 0 to 1, got {_number(value)}"
        if self.below or (self.above and self.low != 0):
            return f"must lie in {self.interval()}, got {_number(value)}"
        if value <= self.low:
            if self.above:
                return f"must be positive, got {_number(value)}"
            return f"must not be negative, got {_number(value)}" if not self.low else self._least(value)
        return f"must be at most {_number(self.high)}, got {_number(value)}"

    def _least(self, value: float) -> str:
        return f"must be at least {_number(self.low)}, got {_number(value)}"

    def interval(self) -> str:
        """In the notation of mathematics: "(0, 1]"."""
        left, right = "(" if self.above else "[", ")" if self.below else "]"
        return f"{left}{_number(self.low)}, {_number(self.high)}{right}"

    def text(self) -> str:
        """For a person: "in [1, 64]"."""
        return f"in {self.interval()}"


def _number(value: float) -> str:
    """As it was given, and short: a whole number of many digits is rounded."""
    return f"{value:.6g}" if isinstance(value, int) and 10**12 < abs(value) < 10**300 else str(value)[:24]


@cache
def ranges(kind: type) -> dict[str, Range]:
    """The ranges of a dataclass's fields, by name."""
    hints = get_type_hints(kind, include_extras=True)
    found = {
        name: next((part for part in get_args(hint) if isinstance(part, Range)), None) for name, hint in hints.items()
    }
    return {name: bounds for name, bounds in found.items() if bounds is not None}


def problems(settings: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each number of a dataclass, and of those inside it, that is out of its range."""
    kind: Any = type(settings)
    allowed = ranges(kind)
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from problems(value, f"{prefix}{item.name}.")
        elif item.name in allowed and (problem := allowed[item.name].problem(value)):
            yield f"{prefix}{item.name} {problem}"


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Refuse a dataclass with a number that is out of its range.

    Args:
        settings: a dataclass, whose fields may be others.
        prefix: put before the fields' names, as "sampling.".

    Raises:
        ValueError: the first field that is wrong, its value, and what would be right.
    """
    for problem in problems(settings, prefix):
        raise ValueError(problem)
