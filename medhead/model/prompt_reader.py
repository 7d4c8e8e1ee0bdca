"""Reading prompts in chunks: between two chunks other passes may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from medhead.model.kv_cache import TreeCache
from medhead.model.state_cache import StateCache

if TYPE_CHECKING:
    from medhead.model.target import Target


class PromptReader:
    """Fills a cache with the tokens of several rows, as many at a time as `advance` is told.

    Args:
        target: reads them; it must be active during `advance`.
        cache: holds the first `starts` tokens of the rows; it is not touched by others until all is read.
        rows: token ids of the texts.
        on_chunk: called with the features `[batch, nodes, size]` of every chunk, and the number of tokens of every row that
            were read before it.
        starts: how many tokens of every row the cache holds; 0 if None.

    Attributes:
        logits: `[batch, vocab]` of every row's last token, once all is read; None before the first chunk.
        features: `[batch, size]` of every row's last token; zeros for a row of which nothing was read.
        left: tokens of the longest row that are still to be read.
        done: tokens of the longest row that were read.
    """

    def __init__(
        self,
        target: Target,
        cache: TreeCache,
        rows: list[list[int]],
        on_chunk: Callable[[torch.Tensor, int], None] | None = None,
        starts: list[int] | None = None,
    ) -> None:
        self._target, self._cache, self._on_chunk = target, cache, on_chunk
        self._lengths, self._starts = [len(row) for row in rows], starts or [0] * len(rows)
        tails = [row[start:] for row, start in zip(rows, self._starts, strict=True)]
        self._counts = [len(tail) for tail in tails]
        self.left, self.done = max(self._counts), 0
        padded = torch.zeros(len(rows), self.left, dtype=torch.long)
        for index, tail in enumerate(tails):
            padded[index, : len(tail)] = torch.tensor(tail, dtype=torch.long)
        self._tokens, self._on_device = padded.to(target.device), torch.tensor(self._counts, device=target.device)
        self.logits: torch.Tensor | None = None
        self.features = torch.zeros(len(rows), target.feature_size, dtype=target.dtype, device=target.device)
        cache.lengths.set(self._starts if self.left else self._lengths)

    def advance(self, chunk: int) -> None:
        """Read the next `chunk` tokens of every row, or all where layers with states cannot read on in the middle."""
        layers = self._target.state_layers
        if layers is not None and not layers.in_chunks:
            chunk = self.left
        with self._target.length_rope.reading(self._lengths, self._target.device):
            self._read(min(chunk, self.left))
        if not self.left:
            self._cache.lengths.set(self._lengths)

    def _read(self, nodes: int) -> None:
        cache, target, done = self._cache, self._target, self.done
        if isinstance(cache, StateCache):
            cache.begin_prompts([min(max(0, count - done), nodes) for count in self._counts], nodes)
        cache.lengths.set([start + done for start in self._starts])
        last = (self._on_device - 1 - done).clamp(0, nodes - 1)
        logits, features = target.read_chunk(cache, self._tokens[:, done : done + nodes], last)
        if self._on_chunk is not None:
            self._on_chunk(features, done)
        inside = ((self._on_device > done) & (self._on_device <= done + nodes))[:, None]
        at_last = features[torch.arange(len(last), device=last.device), last]
        self.logits = logits if self.logits is None else torch.where(inside, logits, self.logits)
        self.features = torch.where(inside, at_last.to(self.features.dtype), self.features)
        self.done, self.left = done + nodes, self.left - nodes


class WholeReader:
    """Reads whole prompts in one turn, as a `PromptReader` whose chunk is as long as they are.

    Args:
        tokens: of the longest prompt.
        read: reads them; returns logits `[batch, vocab]` and features `[batch, size]` of every prompt's last token.

    Attributes:
        logits: see `PromptReader`, as all others.
    """

    def __init__(self, tokens: int, read: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._read, self.left, self.done = read, tokens, 0
        self.logits: torch.Tensor | None = None
        self.features = torch.empty(0)

    def advance(self, chunk: int) -> None:
        """Read all tokens of every prompt."""
        self.logits, self.features = self._read()
        self.left, self.done = 0, self.left


def read_whole(
    target: Target, cache: TreeCache, rows: list[list[int]], on_chunk: Callable[[torch.Tensor, int], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill an empty cache with whole texts as transformers reads them: each row alone, in one pass.

    `on_chunk` is called once, with the features of all tokens.

    Returns:
        logits `[batch, vocab]` and features `[batch, size]` of every last token.
    """
    logits, features = list[torch.Tensor](), list[torch.Tensor]()
    for index, row in enumerate(rows):
        alone = cache if len(rows) == 1 else target.new_cache(1, len(row))
        alone.lengths.set([0])
        with target.length_rope.reading([len(row)], target.device):
            tokens, last = torch.tensor([row], device=target.device), torch.tensor([len(row) - 1], device=target.device)
            found = target.read_chunk(alone, tokens, last)
        logits.append(found[0])
        features.append(found[1][0])
        if alone is not cache:
            cache.load_tokens(index, iter(alone.copy_tokens(0, 0, len(row))))
    cache.lengths.set([len(row) for row in rows])
    if on_chunk is not None:
        on_chunk(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), 0)
    return torch.cat(logits), torch.stack([one[-1] for one in features])
