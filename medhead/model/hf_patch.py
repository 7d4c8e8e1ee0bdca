"""Patch of one model's `generate` that passes streamer and tokenizer on to a custom decoder with `takes_streamer`.

`generate(custom_generate=f, streamer=..., tokenizer=...)` calls `f` without the streamer, and no longer finds the tokenizer
that stop strings need (transformers 5.17 to 5.23). While a decoder is open, its model's `_extract_generation_mode_kwargs`
returns both, and overrides fields of the model's generation configuration that ask for a cache of another kind, before
transformers makes it; `Decoder.close` removes the patch.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from torch import nn

from medhead.generation_config import drop_fields_without_effect

_NAME = "_extract_generation_mode_kwargs"
_open_decoders: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class _Extract:
    """What replaces the method of one model; a copy of the model gets its own, a pickled one the method of its class."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # no reference cycle, so that a model is freed when its last reference goes

    def __call__(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> Any:
        model: Any = self._model()
        given = {"streamer": streamer, "tokenizer": kwargs.get("tokenizer")}
        found = getattr(type(model), _NAME)(model, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if getattr(custom_generate, "takes_streamer", False):
            drop_fields_without_effect(model, kwargs)
            found |= {name: value for name, value in given.items() if value is not None}
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Extract:
        model: Any = self._model()
        return _Extract(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return getattr, (self._model(), _NAME)


def patch_generate(model: nn.Module) -> None:
    """Pass streamer and tokenizer of this model's `generate` to decoders; count the open decoders."""
    with _lock:
        _open_decoders[model] = _open_decoders.get(model, 0) + 1
        object.__setattr__(model, _NAME, _Extract(model))


def unpatch_generate(model: nn.Module) -> None:
    """Remove the patch when the last open decoder of this model closes."""
    with _lock:
        _open_decoders[model] = _open_decoders.get(model, 1) - 1
        if _open_decoders[model] <= 0:
            _open_decoders.pop(model, None)
            model.__dict__.pop(_NAME, None)
