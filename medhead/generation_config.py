"""What a model's generation configuration says: end tokens, arguments of `generate`, and how commands override it."""

from __future__ import annotations

import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from medhead.config import SamplingParams
from medhead.errors import MedheadError, one_line

# Fields of a checkpoint that change no text of medhead's, with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, Any] = {
    "use_cache": True,
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "compile_config")),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "low_memory", "is_assistant"), False),
}
# Fields of a checkpoint about the form of the result, which is the caller's choice, with the values that commands need.
_FORM = {"max_length": None, "num_return_sequences": 1, "return_dict_in_generate": False}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def end_tokens(model: Any, tokenizer: Any = None) -> list[int]:
    """Return the ids that end a text: those of the model's generation configuration, then the tokenizer's EOS token."""
    found = (model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
    return list(
        dict.fromkeys(int(token) for ids in found if ids is not None for token in torch.as_tensor(ids).flatten())
    )


def stop_strings(model: Any) -> tuple[str, ...]:
    """Return the strings at which the model's generation configuration ends a text."""
    found = getattr(model.generation_config, "stop_strings", None)
    return (found,) if isinstance(found, str) else tuple(found or ())


def generate_arguments(model: Any, params: SamplingParams, tokenizer: Any = None) -> dict[str, Any]:
    """Return the arguments of `model.generate` for sampling parameters, without their seed and stop strings.

    Parameters that are None take the value of the model's generation configuration, as do all fields that sampling
    parameters do not have. Sampling keeps all tokens where neither says otherwise.

    Args:
        model: the model, whose `generation_config` counts.
        params: sampling parameters.
        tokenizer: its EOS token ends a text too; it decodes the text for stop strings of the configuration.
    """
    config = model.generation_config
    arguments: dict[str, Any] = {"max_new_tokens": params.max_new_tokens, "do_sample": not params.greedy}
    given: dict[str, Any] = {name: getattr(params, name) for name in ("repetition_penalty", "no_repeat_ngram_size")}
    given["min_new_tokens"] = params.min_new_tokens
    if not params.greedy:
        arguments["temperature"] = float(params.temperature)
        given |= {"top_p": params.top_p, "min_p": params.min_p}
        given["top_k"] = params.top_k if params.top_k is not None or config.top_k is not None else 0
    arguments |= {name: value for name, value in given.items() if value is not None}
    arguments |= {name: value for name, value in _FORM.items() if getattr(config, name, None) not in (None, value)}
    if tokenizer is not None:
        arguments["eos_token_id"] = end_tokens(model, tokenizer) or None
        arguments |= {"tokenizer": tokenizer} if stop_strings(model) else {}
    return arguments


def drop_fields_without_effect(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Override fields of the model's generation configuration that ask for another cache or algorithm of the same text.

    Args:
        model: the model.
        arguments: those of its `generate`; what the caller gives stays. The others are added, with one warning per model.
    """
    config: Any = getattr(model, "generation_config", None)
    dropped = {
        name: getattr(config, name)
        for name, off in _WITHOUT_EFFECT.items()
        if name not in arguments and getattr(config, name, None) not in (None, off)
    }
    arguments |= {name: _WITHOUT_EFFECT[name] for name in dropped}
    if dropped and model not in _warned:
        _warned.add(model)
        listed = ", ".join(f"{name}={one_line(value, 60)}" for name, value in dropped.items())
        warnings.warn(f"medhead ignores {listed} of the model's generation configuration", stacklevel=2)


def override_generation_config(model: Any, given: str | None) -> None:
    """Change a model's generation configuration as the option `--generation-config` says.

    Args:
        model: the model.
        given: `none` keeps the special tokens alone, a JSON object replaces fields, a folder or hub id replaces all
            fields but special tokens that it lacks. None changes nothing.

    Raises:
        MedheadError: it is none of these.
    """
    if given is None:
        return
    own, option = model.generation_config, f"--generation-config {given[:60]!r}"
    special = {name: getattr(own, name) for name in _SPECIAL_TOKENS}
    try:
        if given.lstrip().startswith("{"):
            fields = {**own.to_dict(), **json.loads(given)}
            unknown = [name for name in json.loads(given) if not hasattr(own, name)]
            if unknown:
                raise MedheadError(f"{option}: transformers knows no field {unknown[0]!r}")
            model.generation_config = GenerationConfig(**fields)
        elif given == "none":
            model.generation_config = GenerationConfig(**special)
        elif Path(given).is_dir() and not (Path(given) / "generation_config.json").is_file():
            raise MedheadError(f"{option}: the folder holds no generation_config.json")
        else:
            model.generation_config = GenerationConfig.from_pretrained(given)
            for name in _SPECIAL_TOKENS:
                if getattr(model.generation_config, name) is None:
                    setattr(model.generation_config, name, special[name])
    except MedheadError:
        raise
    except (ValueError, TypeError, OSError) as error:
        allowed = "give none, a folder with a generation_config.json, or a JSON object of its fields"
        raise MedheadError(f"{option} cannot be read ({one_line(error, 120)}); {allowed}") from None


def recorded_fields(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the fields of the model's generation configuration that decide about texts, for a JSON file."""
    left_out = {"transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "max_new_tokens"}
    left_out |= {"do_sample", "temperature", *_WITHOUT_EFFECT, *_FORM}
    own = model.generation_config.to_diff_dict() | {"eos_token_id": end_tokens(model, tokenizer)}
    fields = {name: value for name, value in own.items() if name not in left_out and value is not None}
    found: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, default=str))
    return found
