"""`python -m medhead.bench`: how much faster, measured honestly. See `command` for what it runs."""

from medhead.bench.command import main

__all__ = ["main"]
