"""Identity of a model's current weights and adapters."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medhead.model.target import Target


def model_state(target: Target) -> Hashable:
    """Return a key that changes when the model is moved or its adapters are switched, which invalidates captured steps."""
    adapters = tuple(
        (module.disable_adapters, str(module.active_adapters), str(getattr(module, "merged", False)))
        for module in target.model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "active_adapters")
    )
    return target.embedding.weight.data_ptr(), target.output.weight.data_ptr(), adapters
