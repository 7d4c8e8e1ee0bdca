"""Exact speculative decoding with token trees for any Hugging Face causal language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medhead.core.acceptance import TypicalAcceptance
    from medhead.core.tree import TokenTree
    from medhead.decoder import Decoder
    from medhead.errors import MedheadError, UnsupportedTargetError
    from medhead.model.loading import load_model, load_tokenizer
    from medhead.proposers import Proposer, register_proposer
    from medhead.statistics import Statistics

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "MedheadError",
    "Proposer",
    "Statistics",
    "TokenTree",
    "TypicalAcceptance",
    "UnsupportedTargetError",
    "load_model",
    "load_tokenizer",
    "register_proposer",
]
_NAMES = {"core.acceptance": ["TypicalAcceptance"], "core.tree": ["TokenTree"], "decoder": ["Decoder"],
          "errors": ["MedheadError", "UnsupportedTargetError"], "model.loading": ["load_model", "load_tokenizer"],
          "proposers": ["Proposer", "register_proposer"], "statistics": ["Statistics"]}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562), so that `medhead --help` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
