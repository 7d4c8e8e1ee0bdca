"""Errors that a user can act on: what was given, what was expected, what to do."""


class MedheadError(ValueError):
    """Wrong input, said in one line. The command line prints it without a traceback and exits with 2."""


class UnsupportedTargetError(MedheadError):
    """A model whose layers cannot verify a token tree, found by probing it."""
