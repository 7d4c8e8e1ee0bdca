"""Inspection of a transformers model: its layers, the shapes in its key/value cache, its context length."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from medhead.errors import UnsupportedTargetError, one_line
from medhead.model.eval_mode import eval_mode
from medhead.model.kv_cache import CacheLayout


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
    except Exception as error:  # layers of other kinds fail at a cache that holds keys and values alone
        with eval_mode(model):
            own = own_cache(model)
        if (found := _indexed_layout(own)) is None:
            raise UnsupportedTargetError(_why_not_cached(name, own, error)) from error
        return found
    returned: Any = getattr(used, argument, None)
    if returned is not cache:
        raise UnsupportedTargetError(
            f"{name} fills no cache of transformers (it caches nothing, or states of its own), so medhead cannot verify trees "
            "with it; most recurrent models have such a cache from transformers 5.24 on"
        )
    for index, layer in enumerate(cache.layers):
        if any(hasattr(layer, state) for state in ("conv_states", "recurrent_states")):
            raise UnsupportedTargetError(
                f"{name} caches more than keys and values: layer {index} is recurrent or convolutional"
            )
    layout = CacheLayout.of(cache)
    if not layout.layers:
        raise UnsupportedTargetError(f"{name} wrote nothing into its key/value cache")
    return layout


def _indexed_layout(own: Cache | None) -> CacheLayout | None:
    """Return what a model caches whose layers select keys by those of an indexer; None if its layers are others."""
    if own is None or any(hasattr(layer, "recurrent_states") for layer in own.layers):
        return None
    found = CacheLayout.of(own)
    return found if found.indexers else None


def _why_not_cached(name: str, own: Cache | None, error: Exception) -> str:
    """Return why a model does not run with a cache of keys and values: its layers cache other things, or it says so itself."""
    if own is not None and (other := other_layers(own)):
        return (
            f"{name} caches more than keys and values of single tokens ({', '.join(other)}), "
            "so medhead cannot verify trees with it"
        )
    return f"{name} does not run with a key/value cache: {describe_failure(error)}"


def describe_failure(error: Exception) -> str:
    """Return why a pass failed; a cache of medhead has no `layers`, which few models read."""
    if isinstance(error, IndexError) and str(error) == "list index out of range":
        return "it reads the layers of transformers' own cache"
    return one_line(f"{type(error).__name__}: {error}", 160)


def other_layers(cache: Cache) -> list[str]:
    """Return the names of the kinds of layers of a cache that belong to one family of models alone."""
    kinds = {type(layer) for layer in cache.layers}
    return sorted(kind.__name__ for kind in kinds if kind.__module__ != DynamicCache.__module__)


def own_cache(model: Any) -> Cache | None:
    """Return the cache that a model makes itself, after two tokens; None if it works with no cache of transformers."""
    argument = cache_argument(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    try:
        own = getattr(model(input_ids=ids, use_cache=True), argument, None)
        if own is None:  # RecurrentGemma does not return it
            own = DynamicCache()
            model(input_ids=ids, use_cache=True, **{argument: own})
    except Exception:  # the caller knows what an ordinary pass says
        return None
    return own if isinstance(own, Cache) else None


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


def uses_registry(model: Any) -> bool:
    """Return whether a file of transformers with classes of the model calls the registered attention functions."""
    names = {type(part).__module__ for part in model.modules()}
    files = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    return not files or any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)


def first_position(model: Any) -> int | None:
    """Return the position that `generate` gives to the first token: 0, or 1 in PaliGemma; None if it gives none."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    try:
        given = model.prepare_inputs_for_generation(
            ids, is_first_iteration=True, position_ids=ids.clone(), use_cache=False
        )
    except Exception:  # it wants more than text, which a pass says better
        return None
    positions = given.get("position_ids")
    return None if positions is None else int(positions.flatten()[0])


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
