"""state.json of a checkpoint: read through one schema, so that no value of it is followed that cannot be right."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.errors import UserError

FORMAT = 2
"""Of the folder; 1 had one whole file a section, written by rank 0."""
_MOST = 2**62
"""Steps, positions and counts of samples: what an int64 holds, with room to go on."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


_WHOLE = "a whole number, not negative"
SCHEMA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_whole, _WHOLE),
    "stage": (_whole, _WHOLE),
    "first_position": (_whole, _WHOLE),
    "position": (_whole, _WHOLE),
    "skipped": (lambda v: isinstance(v, list) and len(v) == 2 and all(map(_whole, v)), "two whole numbers"),
    "seconds": (_seconds, "a number, not negative"),
    "fingerprint": (lambda v: isinstance(v, str), "a text"),
}
"""What each value must be, where it is there; `step` always is."""


def check_state(path: Path, state: dict[str, Any]) -> None:
    """Refuse a state.json whose values cannot be right.

    Raises:
        UserError: another format; a value missing or of another kind, by name; a step that is not its folder's.
    """
    if state.get("format", 1) != FORMAT:
        raise UserError(
            f"{path} says format {state.get('format', 1)!r} and this version reads format {FORMAT}; "
            "go on with the version that wrote it, or start a new run with --output.name"
        )
    if "step" not in state:
        raise UserError(f"{path} does not say its step: it was changed, or written by something else")
    for name, (fits, wanted) in SCHEMA.items():
        if name in state and not fits(state[name]):
            raise UserError(f"{path} says {name} {str(state[name])[:80]!r}, which must be {wanted}")
    folder = re.fullmatch(r"step-(\d+)", path.parent.name)
    if folder and int(folder[1]) != state["step"]:
        raise UserError(f"{path} says step {state['step']}, and its folder {path.parent.name}: one was changed")


def need(path: Path, state: dict[str, Any], *names: str) -> tuple[Any, ...]:
    """Values of a checked state that going on needs.

    Raises:
        UserError: one is not there.
    """
    for name in names:
        if name not in state:
            raise UserError(f"{path} does not say {name}, without which nobody can go on from it")
    return tuple(state[name] for name in names)
