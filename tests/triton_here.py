"""Marks for tests of Triton's kernels, compiled on a GPU or interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch


@cache
def _skip_reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.cuda.is_available():
        return None
    from medhead_kernels.commit import move

    try:
        move(torch.zeros(1, 1, 1, 1, 16), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    except Exception as error:
        if "only 0-dimensional arrays" in str(error):
            return "this triton's interpreter does not work with numpy 2.4 or newer (pip install -U triton)"
        raise
    return None


@contextmanager
def row_products() -> Iterator[None]:
    """Let the interpreted path attention multiply every row in one order, which numpy does not do and tensor cores do."""
    from medhead_kernels import tree_path_attention
    from triton_row_dot import row_dot

    with patch.object(tree_path_attention, "dot", row_dot):
        yield


needs_triton = pytest.mark.skipif(_skip_reason() is not None, reason=str(_skip_reason()))
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so Triton is not interpreted")
