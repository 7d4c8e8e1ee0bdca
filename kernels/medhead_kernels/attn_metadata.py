"""Arguments of an attention backend besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttnParams:
    """Options of one layer's attention.

    Attributes:
        scale: factor of the scores.
        window: sliding window; a node at position p sees positions above `p - window`. None for no window.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[heads]`, one extra score per head that takes part in the softmax and carries no value (GPT-OSS).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TreeMetadata:
    """Layout of the key columns: the first `length` columns of a row are its prefix, the next ones its tree nodes.

    Attributes:
        lengths: `[batch]` int32, committed tokens of every row, on the device.
        host_lengths: the same numbers on the host; empty where only the device knows them, as in a captured step.
        ancestor_bitmask: `[batch or 1, nodes, ceil(nodes / 64)]` int64; bit j % 64 of element j // 64 is set when j is the
            node or one of its ancestors.
        depth: `[batch or 1, nodes]` int64, depth of every node; its position is `length + depth`.
    """

    lengths: Tensor
    host_lengths: tuple[int, ...]
    ancestor_bitmask: Tensor
    depth: Tensor

    @property
    def nodes(self) -> int:
        """Number of nodes of every row."""
        return self.ancestor_bitmask.shape[1]

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same length."""
        return min(self.host_lengths) == max(self.host_lengths)

    @cached_property
    def visible(self) -> Tensor:
        """Return `[batch or 1, nodes, nodes]` bool: whether node i sees node j."""
        shifts = torch.arange(64, device=self.ancestor_bitmask.device)
        return ((self.ancestor_bitmask[..., None] >> shifts & 1) != 0).flatten(2)[..., : self.nodes]

    def bias(self, columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the dense additive mask `[batch, 1, nodes, columns]`: 0 where visible, else the lowest number."""
        batch, nodes, device = self.lengths.shape[0], self.nodes, self.lengths.device
        lengths = self.lengths.long()[:, None]
        column = torch.arange(columns, device=device)
        visible = (column < lengths)[:, None].repeat(1, nodes, 1)
        node_columns = (lengths + torch.arange(nodes, device=device))[:, None]  # [batch, 1, nodes]
        visible.scatter_(2, node_columns.expand(batch, nodes, nodes), self.visible.expand(batch, nodes, nodes))
        if window is not None:
            query_position = lengths + self.depth.expand(batch, nodes)
            key_position = column.repeat(batch, 1).scatter_(1, node_columns[:, 0], query_position)
            visible &= key_position[:, None] > query_position[..., None] - window
        return additive_mask(visible, dtype)[:, None]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible` is true and the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
