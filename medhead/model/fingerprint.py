"""What tells a model as it is now from the model that was captured or compiled."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medhead.model.target import Target


def model_state(target: Target) -> Hashable:
    """What changes when the model is moved, or when its adapters are switched; a captured step would not notice."""
    adapters = tuple(
        (module.disable_adapters, str(module.active_adapters), str(getattr(module, "merged", False)))
        for module in target.model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    )
    return target.embedding.weight.data_ptr(), target.output.weight.data_ptr(), adapters
