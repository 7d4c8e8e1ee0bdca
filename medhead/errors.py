"""Errors that a user can act on: each names what was given, what is allowed and what to do."""


class MedheadError(ValueError):
    """Wrong input, described in one line. The command line prints it without a traceback and exits with code 2."""


class UnsupportedTargetError(MedheadError):
    """The model cannot verify a token tree; found by probing it."""


def one_line(text: object, limit: int | None = None) -> str:
    """Return the text of an error on one line of at most `limit` characters."""
    return " ".join(str(text).split())[:limit]
