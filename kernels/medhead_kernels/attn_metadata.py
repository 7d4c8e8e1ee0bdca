"""What the backends are told of a pass and of a layer, besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

WORD_BITS = 64


@dataclass(frozen=True, eq=False)
class Scoring:
    """How scores are made of products of queries and keys, and which keys a layer hides besides.

    Attributes:
        scale: factor of the scores.
        window: a node at position p sees positions above `p - window`; None for all.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[heads]`, one extra score per head that takes part in the softmax and carries no value (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TreeColumns:
    """A row's committed prefix fills its first `length` columns, its nodes the columns behind.

    Attributes:
        lengths: `[batch]` int32, committed tokens of every row, on the device.
        host_lengths: the same numbers on the host; empty where only the device knows them, as in a captured step.
        words: `[batch or 1, nodes, ceil(nodes / 64)]` int64: bit j % 64 of word j // 64 is set when j is the node or an
            ancestor of it.
        depth: `[batch or 1, nodes]` int64, depth of every node; its position is `length + depth`.
    """

    lengths: Tensor
    host_lengths: tuple[int, ...]
    words: Tensor
    depth: Tensor

    @property
    def nodes(self) -> int:
        """Nodes of every row."""
        return self.words.shape[1]

    @property
    def uniform(self) -> bool:
        """Whether all rows have one length."""
        return min(self.host_lengths) == max(self.host_lengths)

    @cached_property
    def visible(self) -> Tensor:
        """`[batch or 1, nodes, nodes]` bool: the node sees the other node."""
        shifts = torch.arange(WORD_BITS, device=self.words.device)
        return ((self.words[..., None] >> shifts & 1) != 0).flatten(2)[..., : self.nodes]

    def bias(self, columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same as a dense additive mask, `[batch, 1, nodes, columns]`: 0 where seen, the lowest number elsewhere."""
        batch, nodes, device = self.lengths.shape[0], self.nodes, self.words.device
        lengths = self.lengths.long()[:, None]
        place = torch.arange(columns, device=device)
        seen = (place < lengths)[:, None].repeat(1, nodes, 1)
        where = (lengths + torch.arange(nodes, device=device))[:, None]  # [batch, 1, nodes]
        seen.scatter_(2, where.expand(batch, nodes, nodes), self.visible.expand(batch, nodes, nodes))
        if window is not None:
            depth = self.depth.expand(batch, nodes)
            position = place.repeat(batch, 1).scatter_(1, where[:, 0], lengths + depth)
            seen &= position[:, None] > (lengths + depth)[..., None] - window
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
