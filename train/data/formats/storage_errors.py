"""What goes wrong with storage, whichever it is."""

from train.errors import UserError


class StorageError(UserError):
    """Storage that could not be reached, though it was asked several times: the run cannot go on."""


class MissingFile(StorageError):
    """The storage answers, and has no such file."""
