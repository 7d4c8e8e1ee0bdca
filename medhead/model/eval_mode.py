"""Evaluation mode for a while, with every module's own mode restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation mode inside the context; afterwards each submodule is in its own mode again."""
    training = [one for one in module.modules() if one.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for one in training:
            one.training = True
