"""What a model's generation configuration says: end tokens, arguments of `generate`, and how commands override it."""

from __future__ import annotations

import json
import re
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from medhead.config import SamplingParams
from medhead.core.penalties import own_processors
from medhead.errors import MedheadError, one_line
from medhead.generate_options import check_config
from medhead.model.prompt_inputs import READING_ERRORS, cannot_read

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
    """Return the ids that end a text: those of the model's generation configuration, then the tokenizer's EOS token.

    Stop strings of the configuration that are special tokens count too, because a text is decoded without special tokens.
    """
    found = [model.generation_config.eos_token_id]
    if tokenizer is not None:
        found.append(tokenizer.eos_token_id)
    if strings := stop_strings(model):
        special = sorted(set(strings) & set(getattr(tokenizer, "all_special_tokens", ())))
        found += map(tokenizer.convert_tokens_to_ids, special)
    return list(
        dict.fromkeys(int(token) for ids in found if ids is not None for token in torch.as_tensor(ids).flatten())
    )


def stop_strings(model: Any) -> tuple[str, ...]:
    """Return the strings at which the model's generation configuration ends a text."""
    found = getattr(model.generation_config, "stop_strings", None) or ()
    strings = [found] if isinstance(found, str) else found
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise MedheadError(f"stop_strings of the model's generation configuration must be strings, got {found!r}")
    return tuple(strings)


def generate_arguments(model: Any, params: SamplingParams, tokenizer: Any = None) -> dict[str, Any]:
    """Return the arguments of `model.generate` for sampling parameters, without seed, stop strings and own processors.

    Parameters that are None take the value of the model's generation configuration, as do all fields that sampling
    parameters do not have. Sampling keeps all tokens where neither says otherwise.

    Args:
        model: the model, whose `generation_config` counts.
        params: sampling parameters.
        tokenizer: its EOS token ends a text too, and so do `stop_token_ids`; it decodes the text for stop strings of the
            configuration.
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
        arguments["eos_token_id"] = [*end_tokens(model, tokenizer), *params.stop_token_ids] or None
    return arguments | ({"tokenizer": tokenizer} if stop_strings(model) else {})


@dataclass
class PreparedGeneration:
    """What transformers prepares for `generate`: it is called in the place of a decoder and keeps its arguments."""

    takes_streamer = True  # as a decoder, see `model.hf_patch`
    config: GenerationConfig = field(default_factory=GenerationConfig)
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    arguments: dict[str, Any] = field(default_factory=dict)  # of the model's forward

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **arguments: Any,
    ) -> Tensor:
        """Keep the prepared configuration, processors, criteria and arguments; decode nothing."""
        self.config, self.processors, self.criteria = generation_config, logits_processor, stopping_criteria
        self.arguments = arguments
        return input_ids


@torch.inference_mode(False)  # captured steps run outside of inference mode, and use the processors' tensors
def prepare_generation(
    model: Any,
    prompt: list[int],
    params: SamplingParams,
    tokenizer: Any = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> PreparedGeneration:
    """Return what `model.generate` prepares for one prompt; stop strings are left out.

    Args:
        model: the model, whose `generation_config` counts.
        prompt: token ids.
        params: sampling parameters.
        tokenizer: its EOS token ends a text too.
        model_inputs: what the model's processor made of the prompt besides token ids, see `serving.Request`.

    Raises:
        MedheadError: the model's generation configuration asks for what transformers or medhead cannot do, or the model
            cannot read the images.
    """
    ids, prepared = torch.tensor([prompt], device=model.device), PreparedGeneration()
    given = {name: _on_device(value, model.device) for name, value in (model_inputs or {}).items()}
    try:
        arguments = generate_arguments(model, params, tokenizer) | {"stop_strings": None, "tokenizer": None}
        drop_fields_without_effect(model, arguments)
        arguments["logits_processor"] = own_processors(params, len(prompt), model.device)
        model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=prepared, **given, **arguments)
    except MedheadError:
        raise
    except READING_ERRORS as error:
        if given:  # the image encoder has run
            raise cannot_read(type(model).__name__, given, error) from None
        if not isinstance(error, (ValueError, TypeError, AttributeError)):
            raise
        raise MedheadError(f"the model's generation configuration cannot be used: {one_line(error, 200)}") from None
    check_config(prepared.config, model.generation_config)
    return prepared


def _on_device(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


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
    """Change a model's generation configuration as the option `--generation-config` says, and refuse values that are wrong.

    Args:
        model: the model.
        given: `none` keeps the special tokens alone, a JSON object replaces fields, a folder or hub id replaces all
            fields but special tokens that it lacks. None changes nothing.

    Raises:
        MedheadError: it is none of these, or transformers or medhead cannot use a value.
    """
    if given is not None:
        try:
            model.generation_config = _overridden(model.generation_config, given)
        except (ValueError, TypeError, OSError) as error:
            allowed = "give none, a folder or hub id with a generation_config.json, or a JSON object of its fields"
            raise MedheadError(f"--generation-config {given[:60]!r}: {one_line(error, 120)}; {allowed}") from None
    prepare_generation(model, [0], SamplingParams(1, 1.0, min_new_tokens=0))


def _overridden(own: GenerationConfig, given: str) -> GenerationConfig:
    special = {name: getattr(own, name) for name in _SPECIAL_TOKENS}
    if given == "none":
        return GenerationConfig(**special)
    if given.lstrip().startswith("{"):
        fields = json.loads(given)
        for name in fields.keys() - vars(own).keys():
            raise ValueError(f"transformers knows no field {name!r}")
        return GenerationConfig(**(own.to_dict() | fields))
    if Path(given).is_dir() and not (Path(given) / "generation_config.json").is_file():
        raise ValueError("the folder holds no generation_config.json")
    if not Path(given).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given):
        raise ValueError("no such folder")
    found = GenerationConfig.from_pretrained(given)
    found.update(**{name: token for name, token in special.items() if getattr(found, name) is None})
    return found


def recorded_fields(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the fields of the model's generation configuration that decide about texts, for a JSON file."""
    left_out = {"transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "max_new_tokens"}
    left_out |= {"do_sample", "temperature", *_WITHOUT_EFFECT, *_FORM}
    own = model.generation_config.to_diff_dict() | {"eos_token_id": end_tokens(model, tokenizer)}
    fields = {name: value for name, value in own.items() if name not in left_out and value is not None}
    found: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True, default=str))
    return found
