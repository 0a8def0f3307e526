"""User errors, as distinct from internal bugs."""

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, row, key), and what to do about it."""
