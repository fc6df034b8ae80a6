"""The one exception that is shown to a user as a single line (exit code 2)."""


class UserError(Exception):
    """Bad input: the message says what was given, what was expected and what to do next."""
