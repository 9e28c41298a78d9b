"""The error that a user can correct."""


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do. Scripts exit with code 2."""
