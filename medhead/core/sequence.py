"""What the decode loop works on: a row, and the settings that all rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import LogitsProcessorList

from medhead.core.acceptance import TypicalAcceptance
from medhead.core.gumbel import GumbelNoise
from medhead.core.stopping import StopChecker


@dataclass
class Sequence:
    """One sequence being decoded.

    Attributes:
        index: row of the user's batch.
        padded: prompt as the user gave it, padding included; what processors and criteria see.
        text: prompt without padding, then the output.
        output: new tokens.
        passes: verify passes so far.
        scores: processed scores of every new token, if asked for.
        logits: raw logits of every new token, if asked for.
        processors: this row's own processors, where they must know which row they serve.
        own: settings of this row alone, where rows of different requests are decoded together.
    """

    index: int
    padded: list[int]
    text: list[int]
    output: list[int] = field(default_factory=list)
    passes: int = 0
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    processors: LogitsProcessorList | None = None
    own: Settings | None = None


@dataclass
class Settings:
    """How one generation samples and what it records.

    Attributes:
        processors: logits processors, in order.
        stopper: decides where rows end.
        noise: sampling noise, None for greedy decoding.
        typical: lossy acceptance, None for exact decoding.
        keep_scores: record processed scores.
        keep_logits: record raw logits.
        on_tokens: called with a row, its new tokens and whether they are its last, after every pass.
        synchronize: called around the timed parts, so that a GPU's time is counted where it is spent; None costs nothing.
    """

    processors: LogitsProcessorList
    stopper: StopChecker
    noise: GumbelNoise | None = None
    typical: TypicalAcceptance | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    on_tokens: Callable[[Sequence, list[int], bool], None] | None = None
    synchronize: Callable[[], None] | None = None
