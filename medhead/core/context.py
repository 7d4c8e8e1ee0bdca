"""The warning about a text that became longer than the model's context."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

from medhead.core.sequence import Sequence
from medhead.model.target import Target

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models of which a text went beyond the context


def warn_beyond_context(target: Target, sequences: list[Sequence], asked: int) -> None:
    """Warn once per model that a text became longer than the model's context, or ended because positions did.

    Args:
        target: the target.
        sequences: all sequences, at their end.
        asked: number of new tokens that were asked for.
    """
    longest = max(sequences, key=lambda one: len(one.token_ids))
    is_cut = longest.is_cut and len(longest.output_ids) < asked and len(longest.token_ids) >= target.max_length
    if target.model in _warned or not (is_cut or len(longest.token_ids) > target.context):
        return
    _warned.add(target.model)
    text = f"a text reached {target.context} tokens, the context of {target.name}"
    goes_on = "it ends there, because the model has no further positions"
    if not is_cut:
        goes_on = "it goes on as in transformers, but the model was not made for longer texts"
    warnings.warn(f"{text}; {goes_on}", stacklevel=3)
