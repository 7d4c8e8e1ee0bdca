"""What is installed besides PyTorch, and works."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any


@cache
def has_numba() -> bool:
    """Whether loops can be compiled for this CPU (the extra `cpu`). A numba that cannot be used is said once and left alone."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        loops(), candidate_loops()
    except Exception as error:  # numba refuses other versions of numpy by ImportError, and may fail in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"numba is installed but cannot be used ({reason}); medhead does without it, slower on a CPU", stacklevel=2
        )
        return False
    return True


@cache
def loops() -> Any:
    """The module `loops`, where `has_numba()`; importing it takes a moment."""
    from medhead_kernels import loops as module

    return module


@cache
def candidate_loops() -> Any:
    """The module `candidate_loops`, likewise."""
    from medhead_kernels import candidate_loops as module

    return module
