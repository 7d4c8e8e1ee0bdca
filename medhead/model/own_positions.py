"""Models that compute positions from the cache's length instead of taking them, as BART's decoder does.

Their table of positions gets those of the running pass, because nodes of one depth and rows of different length have others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class OwnPositions:
    """Gives the tables of positions of a model the positions of a target's passes.

    Args:
        model: the model.
        is_running: whether the target's pass runs in this thread.

    Attributes:
        modules: the tables; empty for a model that takes positions.
        positions: `[batch, nodes]` of the running pass.
    """

    def __init__(self, model: Any, is_running: Callable[[], bool]) -> None:
        takes = "position_ids" in inspect.signature(model.forward).parameters
        self.modules = [] if takes else [module for module in model.modules() if _is_table(module)]
        self.positions: Tensor | None = None
        self._is_running = is_running

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the outputs of the tables inside the context."""
        hooks = [module.register_forward_hook(self._replace) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _replace(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if self.positions is None or not self._is_running():
            return None
        rows = self.positions + getattr(module, "offset", 0)
        return nn.functional.embedding(rows.to(module.weight.device), module.weight)


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and "position_ids" in inspect.signature(module.forward).parameters
