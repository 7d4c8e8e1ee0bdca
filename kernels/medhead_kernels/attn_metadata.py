"""Arguments of an attention backend besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttnParams:
    """Options of one layer's attention."""

    scale: float  # factor of the scores
    window: int | None = None  # sliding window: a node at position p sees positions above `p - window`
    softcap: float | None = None  # scores become `softcap * tanh(scores / softcap)` (Gemma 2)
    sinks: Tensor | None = None  # `[heads]` extra scores that take part in the softmax and carry no value (GPT-OSS)


@dataclass(frozen=True, eq=False)
class TreeMetadata:
    """Layout of the key columns: the first `length` columns of a row are its prefix, the next ones its tree nodes."""

    lengths: Tensor  # `[batch]` int32, committed tokens of every row, on the device
    # the same numbers on the host; empty where only the device knows them, as in a captured step
    host_lengths: tuple[int, ...]
    # `[batch or 1, nodes, ceil(nodes / 64)]` int64; bit j % 64 of element j // 64 is set when j is the node or one of
    # its ancestors
    ancestor_bitmask: Tensor
    depth: Tensor  # `[batch or 1, nodes]` int64, depth of every node; its position is `length + depth`

    @property
    def nodes(self) -> int:
        """Number of nodes of every row."""
        return self.ancestor_bitmask.shape[1]

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same length."""
        return min(self.host_lengths) == max(self.host_lengths)

    @cached_property
    def visible(self) -> Tensor:
        """Return `[batch or 1, nodes, nodes]` bool: whether node i sees node j."""
        shifts = torch.arange(64, device=self.ancestor_bitmask.device)
        return ((self.ancestor_bitmask[..., None] >> shifts & 1) != 0).flatten(2)[..., : self.nodes]

    def bias(self, columns: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the dense additive mask `[batch, 1, nodes, columns]`: 0 where visible, else the lowest number."""
        visible = visible_keys(self.lengths.long(), self.visible, columns)
        if window is not None:
            queries, keys = positions(self.lengths.long(), self.depth, columns)
            visible &= keys[:, None] > queries[..., None] - window
        return additive_mask(visible, dtype)[:, None]


def visible_keys(lengths: Tensor, tree: Tensor, columns: int) -> Tensor:
    """Return `[batch, nodes, columns]` bool: the column is in the row's prefix, or `tree` shows its node to the node.

    `lengths` is `[batch]` int64, `tree` `[batch or 1, nodes, nodes]` bool.
    """
    batch, nodes = lengths.shape[0], tree.shape[1]  # `len` would fix the batch size of a traced pass
    visible = (torch.arange(columns, device=tree.device) < lengths[:, None])[:, None].repeat(1, nodes, 1)
    node_columns = lengths[:, None, None] + torch.arange(nodes, device=tree.device)
    return visible.scatter_(2, node_columns.expand(batch, nodes, nodes), tree.expand(batch, nodes, nodes))


def positions(lengths: Tensor, depth: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the nodes `[batch, nodes]` and of all key columns `[batch, columns]`."""
    queries = lengths[:, None] + depth
    node_columns = lengths[:, None] + torch.arange(depth.shape[1], device=depth.device)
    keys = torch.arange(columns, device=depth.device).repeat(queries.shape[0], 1)
    return queries, keys.scatter_(1, node_columns.expand_as(queries), queries)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible` is true and the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
