"""What `generate` returns."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from medhead.core.sequence import Sequence


def pad_token(config: GenerationConfig) -> int:
    """Return the token that fills the rows that ended."""
    for value in (getattr(config, "_pad_token_tensor", None), config.pad_token_id, config.eos_token_id, 0):
        if value is not None:
            return int(torch.as_tensor(value).flatten()[0])
    return 0


def generate_output(
    sequences: list[Sequence], input_ids: Tensor, pad: int, config: GenerationConfig
) -> Tensor | GenerateDecoderOnlyOutput:
    """Return prompts and new tokens `[batch, length]`, with scores and logits where the configuration asks for a dictionary."""
    longest = max(len(one.output_ids) for one in sequences)
    output = torch.full((len(sequences), longest), pad, dtype=input_ids.dtype)
    for one in sequences:
        output[one.index, : len(one.output_ids)] = torch.tensor(one.output_ids)
    result = torch.cat([input_ids, output.to(input_ids.device)], 1)
    if not config.return_dict_in_generate:
        return result
    return GenerateDecoderOnlyOutput(
        sequences=result,
        scores=_columns([one.scores for one in sequences], longest) if config.output_scores else None,
        logits=_columns([one.logits for one in sequences], longest) if config.output_logits else None,
    )


def _columns(rows: list[list[Tensor]], longest: int) -> tuple[Tensor, ...]:
    """Return one `[batch, vocab]` tensor for each new token; zeros where a sequence had ended."""
    blank = torch.zeros_like(next(row[0] for row in rows if row))
    return tuple(torch.stack([row[at] if at < len(row) else blank for row in rows]) for at in range(longest))
