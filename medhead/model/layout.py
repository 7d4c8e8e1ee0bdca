"""Inspection of a transformers model: its layers, the shapes in its key/value cache, its context length."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from medhead.errors import UnsupportedTargetError, one_line
from medhead.model.eval_mode import eval_mode
from medhead.model.kv_cache import CacheLayout, KVSpec


@torch.no_grad()
def find_layout(model: Any) -> CacheLayout:
    """Return the shapes that every layer caches, found by one ordinary pass over two tokens.

    A model that caches no keys and values, or also other states (see `find_states`), raises an `UnsupportedTargetError`.
    """
    name, argument = type(model).__name__, cache_argument(model)
    cache: Any = DynamicCache()
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try:
        with eval_mode(model):
            used = model(input_ids=ids, use_cache=True, **{argument: cache})
    except Exception as error:
        raise UnsupportedTargetError(f"{name} does not run with a key/value cache: {one_line(error, 160)}") from error
    returned: Any = getattr(used, argument, None)
    if returned is not cache:
        raise UnsupportedTargetError(
            f"{name} keeps states of its own instead of a cache of transformers, so medhead cannot verify trees with it "
            "(most recurrent models have such a cache from transformers 5.24 on)"
        )
    found = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if any(hasattr(layer, state) for state in ("conv_states", "recurrent_states")):
            raise UnsupportedTargetError(
                f"{name} caches more than keys and values: layer {index} is recurrent or convolutional"
            )
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            found[index] = KVSpec.of(keys), KVSpec.of(values)
    if not found:
        raise UnsupportedTargetError(f"{name} wrote nothing into its key/value cache")
    return CacheLayout(found)


def input_device(model: Any) -> torch.device:
    """Return the device that token ids go to; accelerate keeps weights that it offloads on `meta` and moves them there."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    moving = [
        part for part in (hook, *getattr(hook, "hooks", ())) if getattr(part, "execution_device", None) is not None
    ]
    return torch.device(moving[0].execution_device) if moving else embedding.weight.device


def output_matrix(model: Any) -> Any:
    """Return the module that maps hidden states to logits: the model's own, or that of the language model inside it."""
    found = model.get_output_embeddings()
    inner = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model)
    return found if found is not None else next(filter(None, (part.get_output_embeddings() for part in inner)), None)


def decoder_layers(model: Any, count: int) -> nn.ModuleList:
    """Return the model's list of `count` decoder layers; an encoder of images may have a list of as many."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for module in [*(() if decoder is None else decoder.modules()), *model.modules()]:
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedTargetError(
        f"{type(model).__name__} has no module list of its {count} layers; heads that read several layers need one"
    )


def cache_argument(model: nn.Module) -> str:
    """Return the name of the cache argument of `forward`: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return the distinct configurations from which the model's modules read the name of their attention function.

    A whole comes before its parts, because a name that is set in it goes to them too.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


def encoder_configs(model: Any) -> set[int]:
    """Return the identities of the configurations of encoders (of images, of sounds) inside the model's."""
    text = _with_parts(model.config.get_text_config(decoder=True))
    return set(_with_parts(model.config)) - set(text) - {id(model.config)}


def _with_parts(config: Any) -> dict[int, Any]:
    """Return a configuration and all configurations inside it by their identity."""
    found = {id(config): config}
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None and hasattr(part, "to_dict"):
            found |= _with_parts(part)
    return found


def context_length(config: Any) -> int:
    """Return the longest sequence that the configuration allows; 2^30 when it sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 30


def max_length(model: Any, context: int) -> int:
    """Return the longest sequence that the model can run: `context` where a table holds that many positions, else 2^30.

    Rotary positions have no end: transformers goes on with them beyond the context.
    """
    embeddings = {id(getattr(part, "weight", None)) for part in (model.get_input_embeddings(), output_matrix(model))}
    sizes = range(context, context + 3)  # a table may have rows for padding
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) and id(weight) not in embeddings and module.num_embeddings in sizes:
            return context
        for name, table in [*module._buffers.items(), *module._parameters.items()]:
            is_table = table is not None and table.ndim >= 2 and (name in module._buffers or "pos" in name)
            if is_table and any(size in sizes for size in table.shape):
                return context
    return 1 << 30
