"""`python -m medhead.bench`: how much faster, measured honestly. See `command` for what it runs.

Other benchmarks by name: `python -m medhead.bench step`, `tasks`, `budget`.
"""

from __future__ import annotations

import sys
from importlib import import_module

OTHERS = ("step", "tasks", "budget")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that is named first, or the one of `command`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    named = arguments[:1] and arguments[0] in OTHERS
    module = import_module(f"medhead.bench.{arguments[0] if named else 'command'}")
    return int(module.main(arguments[1:] if named else arguments))


__all__ = ["main"]
