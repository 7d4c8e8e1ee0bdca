"""What commands share; the branch of the commands replaces this file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from medhead.errors import MedheadError
from medhead.generate import Parser, add_model_options, guarded

__all__ = ["Parser", "add_model_options", "check_range", "guarded", "run_command"]


def run_command(parser: Parser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse the arguments, run `work` on them, and return the exit code."""
    args = parser.parse_args(argv)
    return guarded(parser.prog, lambda: work(args))


def check_range(
    args: argparse.Namespace, name: str, low: float, high: float = math.inf, allowed: str | None = None
) -> None:
    """Raise a MedheadError unless the option (each of its values, if it has several) is None or from `low` to `high`."""
    given = getattr(args, name)
    for value in given if isinstance(given, list) else [] if given is None else [given]:
        if not low <= value <= high:  # also true of nan
            allowed = allowed or (f"at least {low}" if high == math.inf else f"from {low:,} to {high:,}")
            raise MedheadError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
