"""What is installed besides PyTorch."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_numba() -> bool:
    """Whether loops can be compiled for this CPU (the extra `cpu`)."""
    return importlib.util.find_spec("numba") is not None
