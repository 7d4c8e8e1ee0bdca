"""Static trees: one shape of ranks for all steps, found by best-first search on measured accuracies (Medusa)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from medhead.core.tree import TokenTree, rank_parents, sorted_ranks
from medhead.errors import MedheadError
from medhead.proposers.growth import Expander, grow


def best_static_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """Return the `nodes - 1` paths of ranks with the largest product of accuracies.

    Best-first search: once a path is taken, its next sibling and its first child become candidates.

    Args:
        accuracies: `accuracies[d][r]`, the share of tokens at depth d + 1 that the draft token of rank r predicted.
        nodes: size of the tree, root included.

    Raises:
        MedheadError: there are no accuracies, or fewer than two nodes.
    """
    if not accuracies or not accuracies[0] or nodes < 2:
        raise MedheadError(f"a static tree needs measured accuracies and at least 2 nodes, got {nodes} nodes")
    heap: list[tuple[float, tuple[int, ...]]] = [(-accuracies[0][0], (0,))]
    taken: list[list[int]] = []
    while heap and len(taken) < nodes - 1:
        value, path = heapq.heappop(heap)
        taken.append(list(path))
        depth, rank = len(path) - 1, path[-1]
        here = accuracies[depth]
        if rank + 1 < len(here) and here[rank] > 0:
            heapq.heappush(heap, (value / here[rank] * here[rank + 1], (*path[:-1], rank + 1)))
        if depth + 1 < len(accuracies):
            heapq.heappush(heap, (value * accuracies[depth + 1][0], (*path, 0)))
    return sorted(taken, key=lambda path: (len(path), path))


class StaticShape:
    """A shape of paths of ranks: which candidates of every level are expanded, and which are in the tree."""

    def __init__(self, ranks: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> None:
        paths = sorted_ranks(ranks)
        if not paths:
            raise MedheadError("a static tree needs at least one path of ranks")
        inner = set(rank_parents(ranks))
        self.nodes, self.depth = len(paths) + 1, max(map(len, paths))
        self.width = max(max(path) for path in paths) + 1
        self._frontiers: list[Tensor] = []
        self._counts: list[int] = []  # nodes below the root down to every level
        chosen: list[int] = []
        frontier: list[tuple[int, ...]] = [()]
        begin = 0
        for level in range(1, self.depth + 1):
            order = {path: place for place, path in enumerate(frontier)}
            of_level = [(node, path) for node, path in enumerate(paths, 1) if len(path) == level]
            places = {path: order[path[:-1]] * self.width + path[-1] for _, path in of_level}
            chosen += [begin + place for place in places.values()]
            begin += len(frontier) * self.width
            frontier = [path for node, path in of_level if node in inner]
            self._frontiers.append(torch.tensor([places[path] for path in frontier], device=device, dtype=torch.long))
            self._counts.append(len(chosen))
        self._chosen = torch.tensor(chosen, device=device)

    def fill(self, roots: Tensor, expander: Expander, max_depth: int) -> TokenTree:
        """Fill the first `max_depth` levels for `roots` `[batch]`; the expander must give `width` children."""
        depth = min(self.depth, max_depth)
        found = grow(roots, expander, depth, self._frontiers)
        return found.select(roots, self._chosen[: self._counts[depth - 1]].expand(len(roots), -1))
