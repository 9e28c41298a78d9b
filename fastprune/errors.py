"""Errors that are the user's to mend."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what to do. Scripts exit with code 2."""
