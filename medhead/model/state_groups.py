"""How a layer that holds states goes through the tokens of a pass: group by group (`StateGroup`), or at once (`Ancestors`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medhead.core.tree import TokenTree


@dataclass(frozen=True)
class StateGroup:
    """Tokens of a pass that a layer reads in one call.

    Attributes:
        tokens: `[items, length]` int64, places among the pass's flattened tokens; the tokens of an item follow each other.
        sources: `[items]` int64, the rows (or nodes, see `of_nodes`) whose state each item starts from.
        of_nodes: whether `sources` are places of nodes; else they are rows with their committed states.
        is_first: whether the items are at the beginning of their texts, where there is no state yet.
        is_whole: whether the items are all rows of the pass, in order and unpadded, so that no argument needs to be split.
    """

    tokens: Tensor
    sources: Tensor
    of_nodes: bool = False
    is_first: bool = False
    is_whole: bool = False


def tree_groups(tree: TokenTree, lengths: list[int]) -> list[StateGroup]:
    """Return one group for each depth of a tree: its nodes read the states of their parents, the roots those of the rows.

    Roots of rows without committed tokens are a group of their own.
    """
    offsets = tree.nodes * torch.arange(tree.batch, device=tree.tokens.device)[:, None]
    groups = []
    for is_first in (False, True):
        rows = torch.tensor(
            [row for row, length in enumerate(lengths) if (length == 0) == is_first], device=offsets.device
        )
        if len(rows) > 0:
            whole = tree.nodes == 1 and len(rows) == tree.batch
            groups.append(StateGroup(offsets[rows], rows, is_first=is_first, is_whole=whole))
    parents = (tree.parents + offsets).flatten()
    groups += [StateGroup(places[:, None], parents[places], of_nodes=True) for places in _below_roots(tree)]
    return groups


def _below_roots(tree: TokenTree) -> Iterator[Tensor]:
    """Yield, for each depth from 1 on, the places of its nodes among the flattened nodes of all rows."""
    depth = tree.depth.flatten()
    for level in range(1, tree.max_depth + 1):
        places = (depth == level).nonzero()[:, 0]
        if len(places) == 0:
            break
        yield places


def prompt_groups(counts: list[int], nodes: int, device: torch.device) -> list[StateGroup]:
    """Return one group for each number of tokens: the first `counts[row]` of a row's `nodes` tokens are real, others padding."""
    groups = []
    for count in sorted({*counts} - {0}):
        rows = torch.tensor([row for row, own in enumerate(counts) if own == count], device=device)
        tokens = rows[:, None] * nodes + torch.arange(count, device=device)
        groups.append(StateGroup(tokens, rows, is_whole=len(rows) == len(counts) and count == nodes))
    return groups


class Ancestors:
    """What dense forms need to know of a tree.

    Attributes:
        visible: `[batch, nodes, nodes]` bool, see `TokenTree.visible`.
        max_depth: the largest depth a node may have.
        nodes: the number of nodes.
        rows: `[batch]` int64, the index of every row.
    """

    def __init__(self, tree: TokenTree) -> None:
        self.visible, self.max_depth, self.nodes = tree.visible, tree.max_depth, tree.nodes
        self._tree, self._parents, self._depth = tree, tree.parents, tree.depth
        self.rows = torch.arange(tree.batch, device=tree.tokens.device)
        self._windows: dict[int, Tensor] = {}

    @property
    def bitmask(self) -> Tensor:
        """See `TokenTree.ancestor_bitmask`."""
        return self._tree.ancestor_bitmask

    @cached_property
    def levels(self) -> list[tuple[Tensor, Tensor]]:
        """The nodes of every depth: places among the flattened nodes, and places of their parents in the level before.

        Both are `[nodes of the depth]` int64; those of the roots are in the order of the rows.
        """
        offsets = self.nodes * self.rows
        parents = (self._parents + offsets[:, None]).flatten()
        index = torch.zeros_like(parents)  # of every node in its level
        index[offsets] = self.rows
        levels = [(offsets, self.rows)]
        for places in _below_roots(self._tree):
            index[places] = torch.arange(len(places), device=places.device)
            levels.append((places, index[parents[places]]))
        return levels

    def windows(self, width: int) -> Tensor:
        """Return the last `width` inputs of every node's path, oldest first, `[batch, nodes, width]` int64.

        They are columns of the `width` committed inputs followed by the nodes.
        """
        if width not in self._windows:
            batch, nodes = self._parents.shape
            before = torch.arange(-1, width - 1, device=self.rows.device).clamp(min=0).expand(batch, width)
            parents = torch.where(self._depth == 0, width - 1, self._parents + width)
            previous = torch.cat([before, parents], 1)
            columns = [torch.arange(width, width + nodes, device=self.rows.device).expand(batch, nodes)]
            for _ in range(width - 1):
                columns.append(previous.gather(1, columns[-1]))
            self._windows[width] = torch.stack(columns[::-1], -1)
        return self._windows[width]
