"""The exceptions that are shown to a user as a single line (exit code 2)."""

from pathlib import Path


class UserError(Exception):
    """Bad input: the message says what was given, what was expected and what to do next.

    A setting's name stands in backticks in it; the command line shows its option there.
    """


class UnfinishedRun(UserError):
    """A run that ended early; what it has found is kept, and it can be carried on.

    Attributes:
        folder: the run's, to carry it on from.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder
