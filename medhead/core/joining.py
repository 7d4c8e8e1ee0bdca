"""Sequences whose prompts are being read: they join a decode loop when all chunks are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medhead.core.buffers import StepBuffers
from medhead.core.sampling import SamplingBatch
from medhead.core.sequence import Sequence
from medhead.model.prompt_inputs import PromptInputs
from medhead.model.prompt_reader import PromptReader, WholeReader, read_whole
from medhead.model.state_cache import StateCache
from medhead.model.target import Target
from medhead.proposers.base import Proposer

_ROOM = 256  # new tokens of a sequence to make room for at first


@dataclass
class StoredPrefix:
    """What is known of the first `length` tokens of a text.

    Attributes:
        length: tokens.
        rows: the target's, see `TreeCache.copy_tokens`.
        drafts: the proposer's, see `DraftCache.copy_tokens`; empty without a draft cache.
        states: the target's states after the last of these tokens; empty without states.
    """

    length: int = 0
    rows: list[Tensor] | tuple[()] = ()
    drafts: list[Tensor] | tuple[()] = ()
    states: dict[Any, Tensor] | None = None


class Joining:
    """Reads the prompts of sequences; the pass over a prompt's last token gives the sequence's first token.

    Args:
        target: the target, active here and in `advance`.
        proposer: begins with the prompts here; the loop's own for its first sequences, else a fork.
        sequences: that will join.
        prefixes: what is known of the first tokens of every prompt, which are not read; None for nothing.
        inputs: of prompts that hold images, which are read at once.

    Attributes:
        cache: the target's rows of what was read.
        draft_cache: what the proposer keeps of it, or None.
    """

    @torch.inference_mode()
    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        sequences: list[Sequence],
        prefixes: list[StoredPrefix] | None = None,
        inputs: PromptInputs | None = None,
    ) -> None:
        self.sequences, self.proposer, self._target = sequences, proposer, target
        self._texts = texts = [sequence.token_ids for sequence in sequences]
        proposer.begin(target, texts)
        wanted = max(sequence.stop_checker.limit for sequence in sequences)
        capacity = max(map(len, texts)) + min(wanted, _ROOM) + proposer.tree_size
        self.cache = target.new_cache(len(texts), capacity)
        self.draft_cache = proposer.new_draft_cache(self.cache.lengths, capacity)
        self._starts = [0] * len(texts) if prefixes is None else [prefix.length for prefix in prefixes]
        for row, prefix in enumerate(prefixes or ()):
            self._load(row, prefix)
        longest, on_chunk = max(map(len, texts)), self._on_chunk
        self._reader: PromptReader | WholeReader
        if inputs is not None:
            self._reader = WholeReader(longest, lambda: target.prefill_inputs(self.cache, inputs, on_chunk))
        elif target.bitwise is not None and (prefixes is None or not target.bitwise.by_default):
            self._reader = WholeReader(longest, lambda: read_whole(target, self.cache, texts, on_chunk))
        else:
            self._reader = PromptReader(target, self.cache, texts, on_chunk, self._starts)

    @property
    def left(self) -> int:
        """Tokens of the longest prompt that are still to be read."""
        return self._reader.left

    def known(self, row: int) -> int:
        """Return how many tokens of a prompt were read, stored ones included."""
        return min(self._starts[row] + self._reader.done, len(self._texts[row]))

    @torch.inference_mode()
    def advance(self, chunk: int) -> None:
        """Read the next `chunk` tokens of every prompt, or all where prompts hold images or are promised bitwise texts.

        Raises:
            MedheadError: the model cannot read prompts with these images.
        """
        self._reader.advance(chunk)

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """The logits `[batch, vocab]` and features `[batch, size]` of every prompt's last token, once all is read."""
        assert self._reader.logits is not None, "prompts have at least one token"
        return self._reader.logits, self._reader.features

    def buffers(self, sampling: SamplingBatch) -> StepBuffers:
        """Return the state of the sequences before their first token: the roots are the prompts' last tokens."""
        self.cache.lengths.set([len(text) - 1 for text in self._texts])
        roots = torch.tensor([text[-1] for text in self._texts], device=self._target.device)
        return StepBuffers(self.cache, self.draft_cache, roots, torch.zeros_like(self.read[1]), sampling)

    def _load(self, row: int, prefix: StoredPrefix) -> None:
        if not prefix.length:
            return
        self.cache.load_tokens(row, iter(prefix.rows))
        if self.draft_cache is not None:
            self.draft_cache.load_tokens(row, iter(prefix.drafts))
        if isinstance(self.cache, StateCache):
            self.cache.load_states(row, prefix.states or {})

    def _on_chunk(self, features: Tensor, start: int) -> None:
        tails = [text[begin:] for text, begin in zip(self._texts, self._starts, strict=True)]
        self.proposer.on_prefill(self.draft_cache, tails, features, start)
