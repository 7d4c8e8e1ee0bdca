"""Which options of `model.generate` work, and a clear refusal for those that cannot."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import MaxLengthCriteria

from medhead.config import check_seed
from medhead.errors import MedheadError
from medhead.grammar import Grammar
from medhead.model.prompt_inputs import PromptInputs, asks_for_nothing, modalities

_BEAMS = "medhead decodes one sequence per row; use num_return_sequences with sampling, or generate without medhead"
# field: (values that mean "off", what to do instead)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), _BEAMS),
    "num_beam_groups": ((None, 1), _BEAMS),
    "diversity_penalty": ((None, 0.0), _BEAMS),
    "constraints": ((None,), _BEAMS),
    "force_words_ids": ((None,), _BEAMS),
    "penalty_alpha": ((None, 0.0), "contrastive search is another algorithm"),
    "dola_layers": ((None,), "DoLa is another algorithm"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance needs a second pass per token"),
    "prompt_lookup_num_tokens": ((None,), "choose medhead's own proposer 'ngram' instead"),
    "assistant_early_exit": ((None,), "choose a medhead proposer instead"),
    "use_mtp": ((None, False), "choose a medhead proposer instead"),
    "speculation_type": ((None,), "choose a medhead proposer instead"),
    "cache_implementation": ((None, "dynamic"), "medhead brings its own cache"),
    "output_attentions": ((None, False), "attention weights are not kept"),
    "output_hidden_states": ((None, False), "hidden states are not kept"),
    "low_memory": ((None, False), "it belongs to contrastive search"),
    "encoder_repetition_penalty": ((None, 1.0), "it belongs to encoder-decoder models"),
    "encoder_no_repeat_ngram_size": ((None, 0), "it belongs to encoder-decoder models"),
    "is_assistant": ((None, False), "medhead is no assistant of another decoder"),
}
_IGNORED_ARGUMENTS = {
    "attention_mask",
    "position_ids",
    "cache",  # the name since transformers 5.24
    "past_key_values",  # the name before
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
_REFUSED_ARGUMENTS = {"inputs_embeds", "output_attentions", "output_hidden_states", "labels"}


def check_config(config: GenerationConfig, own: GenerationConfig) -> None:
    """Refuse what cannot be honoured.

    Args:
        config: of this generation.
        own: the model's; the error says so if the value is its.

    Raises:
        MedheadError: names the field, its value, and what to do.
    """
    for name, (off, advice) in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in off:
            if getattr(own, name, None) == value:
                advice += f"; the model's generation configuration asks for it: pass {name}={off[-1]!r}"
                advice += ", or on the command line --generation-config none"
            raise MedheadError(f"{name}={value!r} is not supported: {advice}")
    if config.use_cache is False:
        raise MedheadError("use_cache=False is not supported: a tree is verified against a cache")


def prompt_inputs(model: Any, input_ids: Tensor, arguments: dict[str, Any]) -> PromptInputs | None:
    """Return what `generate` hands over for the prompts besides token ids (images), None for text alone.

    Args:
        model: the target's model.
        input_ids: `[batch, length]`.
        arguments: of the model's forward.

    Raises:
        MedheadError: names an argument that medhead would have to ignore.
    """
    for name in ("cache", "past_key_values"):
        cache = arguments.get(name)
        if cache is not None and _has_content(cache):
            raise MedheadError(f"{name} with content is not supported: pass the whole text as input_ids")
    given = {
        name: value
        for name, value in arguments.items()
        if name not in _IGNORED_ARGUMENTS and not asks_for_nothing(name, value)
    }
    if refused := sorted(_REFUSED_ARGUMENTS & given.keys()):
        raise MedheadError(f"{', '.join(refused)} cannot be used with medhead: pass the text as input_ids")
    if given and modalities(model) <= {"text"}:
        raise MedheadError(
            f"{', '.join(sorted(given))} cannot be used with medhead: {type(model).__name__} reads text only"
        )
    if not given:
        return None
    mask = arguments.get("attention_mask")
    mask = None if mask is None or bool(mask.all()) else mask.to(input_ids.device)
    return PromptInputs(input_ids, mask, arguments.get("position_ids"), given)


def _has_content(cache: Any) -> bool:
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # a cache of states alone has no length
        return cache.has_previous_state()


def length_limit(config: GenerationConfig, criteria: StoppingCriteriaList) -> int:
    """Return the largest length of prompt and output; a `MaxLengthCriteria` of the user's own replaces the field."""
    return min((one.max_length for one in criteria if type(one) is MaxLengthCriteria), default=int(config.max_length))


def row_processors(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """Return the processors of one row of the batch; those that hold something for every row are narrowed to it."""
    return LogitsProcessorList([_for_row(processor, row) for processor in processors])


def _for_row(processor: Any, row: int) -> Any:
    """`prefix_allowed_tokens_fn` asks which row it serves; a repetition penalty knows every row's padding."""
    if type(processor) is lp.PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return lp.PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), 1)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor) and ignored.ndim == 1:
        processor = copy(processor)
        processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


def row_grammars(grammar: Grammar | list[Grammar | None] | None, rows: int) -> list[Grammar | None]:
    """Return the grammar of every row; those of several returned sequences of a prompt are the same.

    Raises:
        MedheadError: a value is no grammar, or their number is not that of the prompts.
    """
    given = grammar if isinstance(grammar, list) else [grammar]
    for one in given:
        if one is not None and not isinstance(one, Grammar):
            raise MedheadError(f"grammar must be a medhead.Grammar or a list of them, got {type(one).__name__}")
    if not given or rows % len(given):
        raise MedheadError(f"grammar has {len(given)} entries for {rows} prompts; give one for each prompt")
    return [one for one in given for _ in range(rows // len(given))]


def unpadded_rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Token ids of every row without padding.

    Raises:
        MedheadError: a row is empty, or its mask has holes.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise MedheadError("the prompt is empty: give at least one token (the tokenizer's BOS token will do)")
    if attention_mask is None:
        return input_ids.tolist()
    rows = []
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
        kept = [token for token, keep in zip(ids, mask, strict=True) if keep]
        if not kept:
            raise MedheadError(f"the prompt in row {row} is empty: give at least one token")
        first = mask.index(True)
        if not all(mask[first : first + len(kept)]):
            raise MedheadError(
                f"the attention mask of row {row} has a hole; only padding before or after the text works"
            )
        rows.append(kept)
    return rows


def check_token_ids(input_ids: Tensor, rows: int) -> None:
    """Refuse ids that the embedding does not have.

    Raises:
        MedheadError: names the id and the size.
    """
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= rows:
        raise MedheadError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {rows}: wrong tokenizer?"
        )


def seed_or_draw(seed: int | None) -> int:
    """Return the seed, or one drawn from torch's own generator, so that `torch.manual_seed` makes a run repeatable."""
    return int(torch.randint(0, 2**62, ())) if seed is None else check_seed(seed)
