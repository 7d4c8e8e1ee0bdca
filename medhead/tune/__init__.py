"""Find what decodes fastest on this machine: `python -m medhead.tune`."""

from medhead.tune.command import main

__all__ = ["main"]
