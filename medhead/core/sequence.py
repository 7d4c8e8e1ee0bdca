"""A sequence that is being decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import LogitsProcessorList

from medhead.config import SamplingParams
from medhead.core.constraint import Constraint
from medhead.core.sampling import to_warpers
from medhead.core.stopping import StopChecker

if TYPE_CHECKING:
    from medhead.model.prompt_inputs import PromptInputs


@dataclass(eq=False)
class Sequence:
    """One sequence of a batch."""

    # token ids of the prompt as the user gave it, padding included; what processors and criteria see
    prompt_ids: list[int]
    token_ids: list[int]  # the prompt without padding, then the output
    stop_checker: StopChecker  # decides where the sequence ends
    params: SamplingParams = field(default_factory=SamplingParams)  # sampling parameters
    index: int = 0  # row of the user's batch
    # the logits processors that are not part of `params`; all of them if not `local`
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    # whether the processors look at one distribution alone; else every node is processed with its own text
    local: bool = True
    # called with the sequence, its new tokens and whether they are its last, after every pass
    on_tokens: Callable[[Sequence, list[int], bool], None] | None = None
    needs_logits: bool = False  # whether `on_tokens` needs `DecodeLoop.output`, which captured steps do not give
    cache_salt: str | None = None  # see `Request`
    constraint: Constraint | None = None  # the state of its grammar; None for any text
    prompt_inputs: PromptInputs | None = None  # of a prompt that holds images, until its reading begins
    has_images: bool = False  # whether the prompt holds images: it is read on its own
    output_ids: list[int] = field(default_factory=list)  # new token ids
    passes: int = 0  # verify passes so far, that over the prompt included
    scores: list[Tensor] = field(default_factory=list)  # processed scores `[vocab]` of every new token, if recorded
    logits: list[Tensor] = field(default_factory=list)  # raw logits `[vocab]` of every new token, if recorded

    @property
    def tokens_left(self) -> int:
        """How many tokens may still be emitted."""
        return self.stop_checker.limit - len(self.output_ids)

    @property
    def is_cut(self) -> bool:
        """Whether the token limit ended it, not an end token."""
        return self.tokens_left < 1 and self.output_ids[-1] not in self.stop_checker.end_tokens

    @property
    def all_processors(self) -> LogitsProcessorList:
        """Every processor in transformers' order, with the warpers that `params` stand for."""
        return LogitsProcessorList([*to_warpers(self.params), *self.processors]) if self.local else self.processors

    def append(self, tokens: list[int], scores: list[Tensor] | None = None) -> bool:
        """Take the tokens of one pass up to where the sequence ends; return whether it has ended.

        Args:
            tokens: what the pass emitted.
            scores: processed scores `[vocab]` of each token, if they are recorded.
        """
        text = self.prompt_ids + self.output_ids
        self.scores += scores or []
        taken, ended = self.stop_checker.take(
            text, len(self.output_ids), tokens, None if scores is None else self.scores
        )
        self.passes += 1
        self.output_ids += taken
        self.token_ids += taken
        del self.scores[len(self.output_ids) :]
        if self.on_tokens is not None:
            self.on_tokens(self, taken, ended)
        return ended


def share_processors(sequences: list[Sequence]) -> bool:
    """Return whether all nodes can be processed together: by the same processors, which look at one distribution alone."""
    first = sequences[0].processors
    return all(one.local and (one.processors is first or one.processors == first) for one in sequences)
