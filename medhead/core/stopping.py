"""When a sequence ends: end tokens, the token limit, stop strings, time, and criteria of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from medhead.errors import MedheadError


class StopChecker:
    """Cuts what a pass emitted where plain decoding would have stopped.

    Args:
        limit: largest number of new tokens.
        end_tokens: tokens that end a sequence.
        criteria: transformers' list for this generation; end tokens are read, the length limit is skipped, all other
            criteria are asked after every single token, as plain decoding does, each row on its own (see `lockstep`
            for criteria that look at the whole batch).
        device: where the criteria expect token ids.
        stops_at: called with every token in turn; says whether the sequence ends there (stop strings of a request).
    """

    def __init__(
        self,
        limit: int,
        end_tokens: Iterable[int] = (),
        criteria: Iterable[Any] | None = None,
        device: torch.device | str = "cpu",
        stops_at: Callable[[int], bool] | None = None,
    ) -> None:
        self.limit, self.device, self.end_tokens, self._stops_at = limit, device, frozenset(end_tokens), stops_at
        self._criteria: list[Any] = []
        for criterion in criteria or ():
            if type(criterion) is EosTokenCriteria:
                self.end_tokens |= frozenset(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
            elif type(criterion) is not MaxLengthCriteria:
                self._criteria.append(criterion)

    @property
    def has_criteria(self) -> bool:
        """Whether criteria beyond end tokens and the limit must see every token."""
        return bool(self._criteria)

    def ends_at(self, token: int, new_tokens: int) -> bool:
        """Return whether a sequence ends with this token, its `new_tokens`-th, by end token or limit."""
        return token in self.end_tokens or new_tokens >= self.limit

    def take(
        self, text: list[int], done: int, tokens: Iterable[int], scores: list[Tensor] | None
    ) -> tuple[list[int], bool]:
        """Return the tokens of one pass that count, and whether the sequence ends with the last of them.

        Args:
            text: prompt (padded as the user gave it) and earlier output.
            done: number of new tokens so far.
            tokens: what the pass emitted.
            scores: processed scores `[vocab]` of all new tokens, those of the pass last, if they are recorded: criteria see
                them as transformers gives them, a tuple of `[1, vocab]` for every new token, else None.
        """
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            stopped = self._stops_at is not None and self._stops_at(token)
            if self.ends_at(token, done + len(taken)) or stopped:
                return taken, True
            seen = None if scores is None else scores[: done + len(taken)]
            if self._criteria and self._ask(text, taken, seen):
                return taken, True
        return taken, False

    def _ask(self, text: list[int], taken: list[int], scores: list[Tensor] | None) -> bool:
        ids = torch.tensor([[*text, *taken]], device=self.device)
        columns = None if scores is None else tuple(one[None] for one in scores)
        # every criterion is asked, as StoppingCriteriaList does: one that counts its calls must see each token
        answers = [bool(torch.as_tensor(criterion(ids, columns)).any()) for criterion in self._criteria]
        return any(answers)


def token_limit(max_new: int, longest_prompt: int, context: int) -> int:
    """Return how many new tokens fit: the limit asked for, or what is left of the context.

    Raises:
        MedheadError: the prompt fills the context, or the limit is below 1.
    """
    if max_new < 1:
        raise MedheadError(f"the number of new tokens must be at least 1, got {max_new}")
    room = context - longest_prompt
    if room < 1:
        raise MedheadError(
            f"the prompt has {longest_prompt} tokens, the model's context is {context}; shorten the prompt"
        )
    return min(max_new, room)
