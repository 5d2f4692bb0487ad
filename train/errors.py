"""Errors that a user can mend: one sentence that says what, where and what to do.

Command-line programs print the sentence and leave with exit code 2; nothing else of ours is caught.
"""

import difflib
import sys
from collections.abc import Callable, Iterable

from train.shown import tell

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Something in the command, the data or a checkpoint that its user can mend; `str(error)` is the whole message."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of `known` comes closest to `name`: "; did you mean 'x'?", or an empty string where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def exit_with_sentence(main: Callable[[], int | None]) -> None:
    """Run a command-line program: a `UserError` becomes one line on stderr and exit code 2, with no traceback."""
    try:
        code = main()
    except UserError as error:
        tell(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code or 0)
