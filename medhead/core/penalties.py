"""Logits processors of OpenAI's API: a bias for token ids, and penalties for tokens that the output holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from medhead.config import SamplingParams


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of token ids.

    transformers' `SequenceBiasLogitsProcessor` reads the text, so it would be asked at every node on its own.

    Args:
        bias: the number by token id.
        device: of the logits.
    """

    def __init__(self, bias: Mapping[int, float], device: torch.device | str) -> None:
        self.token_ids = torch.tensor(list(bias), device=device)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `[rows, vocab]` with the bias added."""
        return scores.index_add(1, self.token_ids, self.bias.to(scores.dtype).expand(len(scores), -1))


class OutputPenalties(LogitsProcessor):
    """Lowers the logits of tokens that the output holds, by OpenAI's definition; the prompt does not count.

    Args:
        presence: subtracted once from the logit of every token that occurs.
        frequency: subtracted as often as the token occurs.
        prompt_tokens: number of prompt tokens, padding included.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self.presence, self.frequency, self.prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `[rows, vocab]` with the penalties subtracted."""
        output = input_ids[:, self.prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def own_processors(params: SamplingParams, prompt_tokens: int, device: torch.device | str) -> LogitsProcessorList:
    """Return the processors of those sampling parameters that transformers does not know."""
    found: LogitsProcessorList = LogitsProcessorList()
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias, device))
    if params.presence_penalty or params.frequency_penalty:
        found.append(OutputPenalties(params.presence_penalty, params.frequency_penalty, prompt_tokens))
    return found
