"""Run draft heads along training text, depth by depth, from randomly sampled anchors.

An anchor is a position t; the root of its path is the token at t+1. At depth d the path holds the text up to t+1+d, and the
heads predict the target's distribution there. One forward pass of the target serves all anchors: its features are the heads'
input and its hidden states give the distributions to learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.heads import Heads
from medhead.heads.draft_cache import DraftCacheView


@dataclass
class PackedBatch:
    """Rows of documents packed one after the other; each tensor is `[rows, length]`."""

    ids: Tensor
    mask: Tensor  # bool: tokens to learn to predict (those of the assistant)
    document: Tensor  # int64: index of each token's document within its row, -1 for padding

    def document_starts(self) -> Tensor:
        """Return the position at which each token's document starts, `[rows, length]`."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        first = torch.ones_like(self.document, dtype=torch.bool)
        first[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return torch.where(first, index, 0).cummax(1).values

    def predictable(self, offset: int) -> Tensor:
        """Return, bool `[rows, length]`, where the token `offset` positions later is in the same document and masked."""
        result, kept = torch.zeros_like(self.mask), self.ids.shape[1] - offset
        if kept > 0:
            later = self.document[:, offset:]
            result[:, :kept] = (later == self.document[:, :kept]) & (later >= 0) & self.mask[:, offset:]
        return result


def sample_anchors(
    batch: PackedBatch, fraction: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return a random fraction of the possible anchors, `[rows, anchors]` ascending, and a bool mask of the valid ones."""
    possible = batch.predictable(2)
    scores = torch.rand(possible.shape, generator=generator).to(possible.device)
    most = int(possible.sum(1).max())
    count = min(most, max(1, round(fraction * most)))
    top = scores.masked_fill(~possible, -1.0).topk(max(count, 1), dim=1)
    anchors = top.indices.masked_fill(top.values < 0, 0).sort(1)  # invalid anchors point at the start of the row
    return anchors.values, (top.values >= 0).gather(1, anchors.indices)


@dataclass
class DraftLevel:
    """What the heads drafted at one depth, for the n anchors whose path reaches it."""

    features: Tensor  # inputs of the output matrix, [n, hidden]
    rows: Tensor  # row of each, [n]
    at: Tensor  # position whose next-token distribution is predicted, [n]; the label is the token at `at + 1`


def unroll(
    heads: Heads, batch: PackedBatch, features: Tensor, embedding: Any,
    anchors: Tensor, valid: Tensor, depth: int | None = None,
) -> Iterator[DraftLevel]:  # fmt: skip
    """Yield what the heads draft at each of `depth` levels (None: all), given the true tokens above it.

    The target's features are `[rows, length, size]`; `anchors` and `valid` are those of `sample_anchors`. Heads with an
    embedding of their own use that instead of the target's `embedding`.
    """
    depth = heads.config.depth if depth is None else depth
    length = batch.ids.shape[1]
    encoded = _encode(heads, batch.ids, embedding, 0)

    def token(level: int) -> Tensor:
        at = (anchors + 1 + level).clamp(max=length - 1)
        if heads.encode_uses_depth and level:
            return _encode(heads, batch.ids.gather(1, at), embedding, level)
        return _gather_rows(encoded, at)

    memory = None
    if heads.cache_entry_size:
        positions = torch.arange(length - 1, device=batch.ids.device)[None]
        entries = heads.encode_cache_entry(features[:, :-1], encoded[:, 1:], positions, length)
        memory = DraftCacheView(entries, anchors + 1, batch.document_starts().gather(1, anchors))
    state, context = heads.init_state(_gather_rows(features, anchors), token(0), memory, depth)
    for level in range(depth):
        state, drafted = heads.step(state, token(level), level, context)
        reached = valid & batch.predictable(2 + level).gather(1, anchors)
        rows, columns = reached.nonzero(as_tuple=True)
        yield DraftLevel(drafted.expand(*anchors.shape, -1)[rows, columns], rows, anchors[rows, columns] + 1 + level)


def _encode(heads: Heads, ids: Tensor, embedding: Any, depth: int) -> Tensor:
    own = heads.own_embedding(depth)
    return heads.encode(embedding(ids) if own is None else F.embedding(ids, own), depth)


def _gather_rows(values: Tensor, at: Tensor) -> Tensor:
    """Return `values` `[rows, length, size]` at the positions `at` `[rows, anchors]`."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))
