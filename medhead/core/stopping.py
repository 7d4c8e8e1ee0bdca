"""When a row ends: end tokens, the token limit, stop strings, time, and criteria of the user's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from medhead.errors import MedheadError


class StopChecker:
    """Cuts what a pass emitted where plain decoding would have stopped.

    Args:
        criteria: transformers' list for this generation; end tokens and the length limit are read from it, all other
            criteria are asked after every single token, as plain decoding does.
        limit: largest number of new tokens.
        device: where the criteria expect token ids.
    """

    def __init__(self, criteria: StoppingCriteriaList, limit: int, device: torch.device) -> None:
        self.limit, self.device = limit, device
        self.end_tokens: frozenset[int] = frozenset()
        self._others = []
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.end_tokens |= frozenset(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
            elif not isinstance(criterion, MaxLengthCriteria):
                self._others.append(criterion)

    def ends_at(self, token: int, new_tokens: int) -> bool:
        """Whether a row ends with this token, its `new_tokens`-th, by end token or limit."""
        return token in self.end_tokens or new_tokens >= self.limit

    def take(
        self, text: list[int], done: int, tokens: Iterable[int], scores: list[Tensor] | None
    ) -> tuple[list[int], bool]:
        """The tokens of one pass that count, and whether the row ends with the last of them.

        Args:
            text: prompt (padded as the user gave it) and earlier output of the row.
            done: number of new tokens so far.
            tokens: what the pass emitted for the row.
            scores: processed scores `[vocab]` of each token, for criteria that look at them, or None.
        """
        taken: list[int] = []
        for index, token in enumerate(tokens):
            taken.append(token)
            if self.ends_at(token, done + len(taken)) or self._asked(text, taken, scores[index] if scores else None):
                return taken, True
        return taken, False

    @property
    def asks_others(self) -> bool:
        """Whether criteria beyond end tokens and the limit exist."""
        return bool(self._others)

    def _asked(self, text: list[int], taken: list[int], scores: Tensor | None) -> bool:
        if not self._others:
            return False
        ids = torch.tensor([[*text, *taken]], device=self.device)
        row = None if scores is None else scores[None]
        # every criterion is asked, as StoppingCriteriaList does: one that counts its calls must see each token
        answers = [bool(torch.as_tensor(criterion(ids, row)).any()) for criterion in self._others]
        return any(answers)


def token_limit(max_new: int, longest_prompt: int, context: int) -> int:
    """New tokens that fit: the limit asked for, or what is left of the context.

    Raises:
        MedheadError: the prompt fills the context, or the limit makes no sense.
    """
    if max_new < 1:
        raise MedheadError(f"the number of new tokens must be at least 1, got {max_new}")
    room = context - longest_prompt
    if room < 1:
        raise MedheadError(
            f"the prompt has {longest_prompt} tokens, the model's context is {context}; shorten the prompt"
        )
    return min(max_new, room)
