"""What a model of transformers is made of, as far as decoding has to know: its layers, what they cache, its context."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from medhead.errors import UnsupportedTargetError
from medhead.model.kv_cache import CacheLayout, KVSpec


@torch.inference_mode()
def find_layout(model: Any) -> CacheLayout:
    """Shapes of what every layer caches, from one ordinary pass over two tokens.

    Raises:
        UnsupportedTargetError: it caches no keys and values, or not them alone.
    """
    name, argument = type(model).__name__, cache_argument(model)
    cache: Any = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    training = model.training
    model.eval()
    try:
        used = model(input_ids=ids, use_cache=True, **{argument: cache})
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedTargetError(f"{name} does not run with a key/value cache: {reason}") from error
    finally:
        model.train(training)
    fills_it = getattr(used, argument, None) is cache
    if not fills_it:
        raise UnsupportedTargetError(
            f"{name} keeps a state of its own instead of a key/value cache (a recurrent model); "
            "medhead cannot verify trees with it yet"
        )
    found = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if any(hasattr(layer, state) for state in ("conv_states", "recurrent_states")):
            raise UnsupportedTargetError(
                f"{name} has recurrent or convolutional layers (layer {index}); "
                "medhead cannot verify trees with them yet"
            )
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            found[index] = tuple(KVSpec(t.shape[1], t.shape[3], t.dtype, t.device) for t in (keys, values))
    if not found:
        raise UnsupportedTargetError(f"{name} wrote nothing into its key/value cache")
    return CacheLayout(found)  # type: ignore[arg-type]


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of the model's decoder layers.

    Raises:
        UnsupportedTargetError: no list of modules has as many entries as the configuration has layers.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedTargetError(
        f"{type(model).__name__} holds no list of its {count} layers, so heads that read several layers cannot be attached"
    )


def cache_argument(model: nn.Module) -> str:
    """What the model's `forward` calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The distinct configurations from which the model's modules read the name of their attention function."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def context_length(config: Any) -> int:
    """Longest sequence the model was made for; a very large number when its configuration does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 30
