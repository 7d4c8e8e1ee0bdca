"""What `model.generate` drops on its way to a custom decoder, handed on.

`generate(custom_generate=f, streamer=..., tokenizer=...)` calls `f` without the streamer, and looks for the tokenizer
that stop strings need where a custom decoder's arguments replaced it (transformers 5.17 to 5.23). While a decoder is
open, its model's `_extract_generation_mode_kwargs` passes both on; `Decoder.close` takes that off again.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

_NAME = "_extract_generation_mode_kwargs"
_open: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def patch_generate(model: nn.Module) -> None:
    """Let this model's `generate` hand streamer and tokenizer to decoders; counts how often it was asked."""
    _open[model] = _open.get(model, 0) + 1
    if _NAME in model.__dict__:
        return
    reference = weakref.ref(model)

    def extract(
        custom_generate: Any, kwargs: dict[str, Any], synced_gpus: Any, assistant_model: Any, streamer: Any
    ) -> Any:
        from medhead.decoder import Decoder

        self = reference()
        tokenizer = kwargs.get("tokenizer")
        found = getattr(type(self), _NAME)(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if isinstance(custom_generate, Decoder):
            found |= {k: v for k, v in (("streamer", streamer), ("tokenizer", tokenizer)) if v is not None}
        return found

    object.__setattr__(model, _NAME, extract)


def unpatch_generate(model: nn.Module) -> None:
    """Undo `patch_generate`; the last one to leave takes the change off."""
    _open[model] = _open.get(model, 1) - 1
    if _open[model] <= 0:
        _open.pop(model, None)
        model.__dict__.pop(_NAME, None)
