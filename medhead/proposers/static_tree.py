"""Static trees: one shape of ranks for all steps, found by best-first search on measured accuracies (Medusa)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from medhead.core.tree import TokenTree, rank_parents, sorted_ranks
from medhead.errors import MedheadError
from medhead.proposers.growth import Expander


def best_static_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """The `nodes - 1` paths of ranks with the largest product of accuracies.

    Best-first: whenever a path is taken, its next sibling and its first child become candidates.

    Args:
        accuracies: `accuracies[d][r]`, how often the rank-r guess of depth d+1 was right.
        nodes: size of the tree, root included.

    Raises:
        MedheadError: no accuracies, or fewer than two nodes.
    """
    if not accuracies or not accuracies[0] or nodes < 2:
        raise MedheadError(f"a static tree needs measured accuracies and at least 2 nodes, got {nodes} nodes")
    heap: list[tuple[float, tuple[int, ...]]] = [(-accuracies[0][0], (0,))]
    taken: list[list[int]] = []
    while heap and len(taken) < nodes - 1:
        value, path = heapq.heappop(heap)
        taken.append(list(path))
        depth, rank = len(path) - 1, path[-1]
        if rank + 1 < len(accuracies[depth]) and accuracies[depth][rank] > 0:
            heapq.heappush(
                heap, (value / accuracies[depth][rank] * accuracies[depth][rank + 1], (*path[:-1], rank + 1))
            )
        if depth + 1 < len(accuracies):
            heapq.heappush(heap, (value * accuracies[depth + 1][0], (*path, 0)))
    return sorted(taken, key=lambda path: (len(path), path))


class StaticShape:
    """A shape of ranks with the index tensors that fill it level by level.

    Args:
        ranks: paths of ranks, every beginning included.
        device: where trees are filled.
    """

    def __init__(self, ranks: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        paths = sorted_ranks(ranks)
        if not paths:
            raise MedheadError("a static tree needs at least one path of ranks")
        self.parents = torch.tensor(rank_parents(ranks), device=device)
        self.nodes, self.depth = len(paths) + 1, max(map(len, paths))
        self.widest = max(max(path) for path in paths) + 1
        self.node_depth = torch.tensor([0, *map(len, paths)], device=device)
        root: tuple[int, ...] = ()
        levels = [[root], *([p for p in paths if len(p) == d + 1] for d in range(self.depth))]
        self._expand, self._pick = [], []
        for parent_index, below in pairwise(levels):
            inner = [place for place, path in enumerate(parent_index) if any(child[:-1] == path for child in below)]
            order = {parent_index[place]: index for index, place in enumerate(inner)}
            self._expand.append(torch.tensor(inner, device=device))
            picked = [order[child[:-1]] * self.widest + child[-1] for child in below]
            self._pick.append(torch.tensor(picked, device=device))
        self._above = [
            torch.tensor([int(i) // self.widest for i in pick.tolist()], device=device) for pick in self._pick
        ]

    def fill(self, roots: Tensor, expander: Expander, max_depth: int) -> TokenTree:
        """Fill the shape's first `max_depth` levels for roots `[batch]`; the expander must name `widest` children."""
        state, tokens, filled = expander.start(), roots[:, None], [roots[:, None]]
        for level, (expand, pick, parent_index) in enumerate(zip(self._expand, self._pick, self._above, strict=True)):
            if level == max_depth:
                break
            state = state[:, expand] if state.shape[1] > 1 else state.expand(-1, len(expand), -1)
            state, _, children = expander.expand(state, tokens[:, expand], level)
            tokens = children.flatten(1)[:, pick]
            state = state[:, parent_index] if state.shape[1] > 1 else state.expand(-1, len(parent_index), -1)
            filled.append(tokens)
        tree_tokens = torch.cat(filled, 1)  # nodes are in order of depth: fewer levels are a beginning of the shape
        batch, nodes = tree_tokens.shape
        parents, depth = self.parents[:nodes].expand(batch, -1), self.node_depth[:nodes].expand(batch, -1)
        return TokenTree(tree_tokens, parents, depth, min(self.depth, max_depth))
