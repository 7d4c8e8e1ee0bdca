"""What heads are trained on: at random anchors of a text, guess the target's own distribution at every depth.

An anchor is a position t. The root is the token at t+1; at depth d the path holds the text's tokens up to t+1+d, and the
heads must say what the target says there. One pass of the target serves everything: its features are what heads start
from, its hidden states give the distributions they learn (no second model).
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
    """A batch of texts.

    Attributes:
        ids: `[rows, length]` token ids.
        mask: `[rows, length]` bool, tokens that the heads should guess (what the assistant wrote).
        document: `[rows, length]` int64, which text of the row a token belongs to; -1 for padding.
    """

    ids: Tensor
    mask: Tensor
    document: Tensor

    def begins(self) -> Tensor:
        """`[rows, length]`: where each token's text begins in its row."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        first = torch.ones_like(self.document, dtype=torch.bool)
        first[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return torch.where(first, index, 0).cummax(1).values

    def guessable(self, ahead: int) -> Tensor:
        """`[rows, length]` bool: the token `ahead` places on belongs to the same text and should be guessed."""
        same = torch.zeros_like(self.mask)
        if ahead < self.ids.shape[1]:
            same[:, : self.ids.shape[1] - ahead] = (
                (self.document[:, ahead:] == self.document[:, : self.ids.shape[1] - ahead])
                & (self.document[:, ahead:] >= 0)
                & self.mask[:, ahead:]
            )
        return same


def choose_anchors(texts: PackedBatch, share: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Random anchors `[rows, anchors]` and which of them are real, bool; in order of position.

    Args:
        texts: the batch.
        share: of the possible anchors; all for 1.
        generator: source of the choice.
    """
    possible = texts.guessable(2)
    chances = torch.rand(possible.shape, generator=generator).to(possible.device)
    most = int(possible.sum(1).max())
    count = min(most, max(1, round(share * most)))
    chances = chances.masked_fill(~possible, -1.0)
    found = chances.topk(max(count, 1), dim=1)
    at = found.indices.masked_fill(found.values < 0, 0).sort(1)  # what only fills a row up points at its beginning
    return at.values, (found.values >= 0).gather(1, at.indices)


@dataclass
class Level:
    """What the heads said at one depth, at those anchors whose path reaches it.

    Attributes:
        features: `[n, hidden]`, for the output matrix.
        rows: `[n]` row of each.
        at: `[n]` position whose distribution is to be guessed; the token to guess is at `at + 1`.
    """

    features: Tensor
    rows: Tensor
    at: Tensor


def unroll(
    heads: Heads,
    texts: PackedBatch,
    features: Tensor,
    embedding: Any,
    anchors: Tensor,
    real: Tensor,
    depth: int | None = None,
) -> Iterator[Level]:
    """Run heads along the texts themselves, depth by depth.

    Args:
        heads: the heads.
        texts: the batch.
        features: `[rows, length, size]` of the target.
        embedding: the target's embedding module; an embedding of the heads' own is used where they bring one.
        anchors: `[rows, anchors]` positions.
        real: `[rows, anchors]` bool.
        depth: levels; the heads' own depth if None.
    """
    depth = heads.config.depth if depth is None else depth
    length = texts.ids.shape[1]
    everywhere = _encode(heads, texts.ids, embedding, 0)

    def token(level: int) -> Tensor:
        at = (anchors + 1 + level).clamp(max=length - 1)
        if heads.encode_uses_depth and level:
            return _encode(heads, texts.ids.gather(1, at), embedding, level)
        return _pick(everywhere, at)

    memory = None
    if heads.cache_entry_size:
        positions = torch.arange(length - 1, device=texts.ids.device)[None]
        rows = heads.encode_cache_entry(features[:, :-1], everywhere[:, 1:], positions, length)
        memory = DraftCacheView(rows, anchors + 1, texts.begins().gather(1, anchors))
    state, context = heads.init_state(_pick(features, anchors), token(0), memory, depth)
    for level in range(depth):
        state, said = heads.step(state, token(level), level, context)
        reached = real & texts.guessable(2 + level).gather(1, anchors)
        rows_, columns = reached.nonzero(as_tuple=True)
        yield Level(said.expand(*anchors.shape, -1)[rows_, columns], rows_, anchors[rows_, columns] + 1 + level)


def _encode(heads: Heads, ids: Tensor, embedding: Any, depth: int) -> Tensor:
    own = heads.own_embedding(depth)
    return heads.encode(embedding(ids) if own is None else F.embedding(ids, own), depth)


def _pick(values: Tensor, at: Tensor) -> Tensor:
    """`[rows, length, size]` at `[rows, anchors]`."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))
