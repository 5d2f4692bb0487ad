"""Errors that a user can mend: one sentence that says what, where and what to do.

Command-line programs print the sentence and leave with exit code 2. So they do with an error of the system that names
its own cure (no room, no right, a file in a folder's place); nothing else is caught.
"""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

from train.shown import tell

EXIT_BAD_INPUT = 2
_CURES = {
    errno.EACCES: "give it to the user who runs this, or choose another folder",
    errno.EPERM: "give it to the user who runs this, or choose another folder",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.ENOTDIR: "a part of this path is a file; move it away, or choose another folder",
    errno.EISDIR: "this is a folder where a file is meant; move it away, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make room on its disk, or choose another folder, and start the same command again",
    errno.EDQUOT: "make room in this user's quota, or choose another folder, and start the same command again",
    errno.EMFILE: "allow more open files (ulimit -n), or fewer data.workers",
}
"""What to do about the errors of the system that a user can mend."""


class UserError(Exception):
    """Something in the command, the data or a checkpoint that its user can mend; `str(error)` is the whole message."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of `known` comes closest to `name`: "; did you mean 'x'?", or an empty string where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def of_the_system(error: OSError) -> str:
    """An error of the system as a sentence: the path, what was wrong, what to do where that is known."""
    cure = f"; {_CURES[error.errno]}" if error.errno in _CURES else ""
    return f"{error.filename or 'a file'}: {error.strerror or error}{cure} ([Errno {error.errno}])"


def exit_with_sentence(main: Callable[[], int | None]) -> None:
    """Run a command-line program: a `UserError` becomes one line on stderr and exit code 2, with no traceback."""
    try:
        code = main()
    except UserError as error:
        tell(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno not in _CURES:
            raise
        tell(f"error: {of_the_system(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code or 0)
