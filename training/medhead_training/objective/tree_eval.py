"""Accuracies and static trees from the ranks of the true tokens.

The ranks that the true tokens after one anchor have among the heads' draft tokens form a rank path. Counting whole paths
gives a static tree's value without assuming, as Medusa's search does, that depths are right independently.

The mean over all anchors overstates the accepted length: decoding skips the tokens that were drafted correctly, so its passes
start more often where drafting is hard. Trees are therefore searched on a simulation of decoding along the text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.proposers.static_tree import best_static_tree

TREE_SIZES = (8, 16, 32, 64)  # nodes of the trees that are stored
MISSED, UNREACHED = -1, -2  # instead of a rank: the token was not drafted; the answer has no token there
SEARCH_ROUNDS = 8  # of `DecodingSimulation.search_tree`

Path = tuple[int, ...]
Tree = list[list[int]]


@dataclass
class HeadAccuracy:
    """What heads drafted on held-out text."""

    anchors: int  # each stands for one token that decoding would emit
    ranks: int  # number of ranks that were distinguished; larger ones are misses
    reached: list[int]  # per depth, the number of anchors whose answer reaches that far
    accuracies: list[list[float]]  # [d][r]: the share of these at which the rank-r draft token of depth d+1 was right
    paths: dict[Path, int]  # every rank path, cut at its first miss or at the end of the answer, and its count
    trees: dict[str, Tree] = field(default_factory=dict)  # by number of nodes, as `HeadsProposer(shape=...)` takes them
    # simulated accepted length of greedy decoding with each of `trees`, and with the top-1 draft tokens only (`chain`)
    accepted_lengths: dict[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of measured depths."""
        return len(self.accuracies)

    def top_k(self, k: int) -> list[float]:
        """Return, per depth, how often one of the first `k` draft tokens was right."""
        return [sum(row[:k]) for row in self.accuracies]

    @cached_property
    def prefix_counts(self) -> dict[Path, int]:
        """The number of anchors whose rank path begins with a path; `()` counts all."""
        return _prefix_counts(self.paths)

    def value(self, path: Sequence[int]) -> float:
        """Return the share of anchors whose rank path begins with `path`: the value of a node of a static tree."""
        return self.prefix_counts.get(tuple(path), 0) / self.anchors

    def mean_length(self, tree: Iterable[Sequence[int]]) -> float:
        """Return a tree's accepted length as the mean over all anchors: 1 plus the values of its nodes."""
        return 1.0 + sum(self.value(path) for path in tree)

    def best_tree(self, nodes: int) -> Tree:
        """Return the static tree of at most `nodes` nodes, root included, with the largest `mean_length`.

        A path is worth at most as much as its prefixes, so the best `nodes - 1` paths form a tree. Ties go to the shorter
        path, then to the lower ranks. Paths that never occurred are left out, but the tree has at least one.
        """
        if nodes < 2:
            raise MedheadError(f"a static tree needs at least 2 nodes, got {nodes}")
        return _best_paths(self.prefix_counts, nodes)

    def chain_length(self) -> float:
        """Return `mean_length` of the chain of top-1 draft tokens."""
        return self.mean_length(_chain(self.depth))

    def independent(self, nodes: int) -> tuple[Tree, float]:
        """Return the tree that `best_static_tree` makes of the accuracies, and its length if depths were independent.

        Both this length and `mean_length` account for answers that end before a depth.
        """
        alive = [now / max(before, 1) for before, now in zip([self.anchors, *self.reached], self.reached, strict=False)]
        rates = [[alive[depth] * rate for rate in row] for depth, row in enumerate(self.accuracies)]
        tree = best_static_tree(rates, nodes)
        return tree, 1.0 + sum(math.prod(rates[depth][rank] for depth, rank in enumerate(path)) for path in tree)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `mean_lengths` is for readers, `from_dict` ignores it."""
        lengths = {nodes: round(self.mean_length(tree), 4) for nodes, tree in self.trees.items()}
        data = asdict(self) | {"mean_lengths": lengths | {"chain": round(self.chain_length(), 4)}}
        paths = {",".join(map(str, path)): count for path, count in data.pop("paths").items()}
        return data | {"paths": paths}  # the longest part is the last

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HeadAccuracy:
        """Return the object that `to_dict` was called on."""
        fields = {name: value for name, value in data.items() if name not in ("mean_lengths", "paths")}
        paths = {tuple(map(int, path.split(","))) if path else (): n for path, n in data["paths"].items()}
        return cls(**fields, paths=paths)


def summarize_ranks(found: Tensor, last: Tensor, ranks: int) -> HeadAccuracy:
    """Count ranks `[anchors, depth]`; `last` `[anchors]` says which anchors are the last of their answer."""
    reached = (found != UNREACHED).cumprod(1).bool()  # after a gap another turn begins, which is not of this path
    reached_counts = reached.sum(0).tolist()
    hits = torch.stack([((found == rank) & reached).sum(0) for rank in range(ranks)], 1).tolist()  # [depth, ranks]
    right = (found >= 0).cumprod(1).bool()
    unique, kind, counts = found.masked_fill(~right, MISSED).unique(dim=0, return_inverse=True, return_counts=True)
    paths = [tuple(rank for rank in row if rank >= 0) for row in unique.tolist()]
    result = HeadAccuracy(
        anchors=len(found),
        ranks=ranks,
        reached=reached_counts,
        accuracies=[[round(n / max(of, 1), 5) for n in row] for row, of in zip(hits, reached_counts, strict=True)],
        paths=dict(zip(paths, counts.tolist(), strict=True)),
    )
    index = torch.arange(len(last))
    ends = torch.where(last, index + 1, len(last)).flip(0).cummin(0).values.flip(0).tolist()
    decoding = DecodingSimulation(paths, kind.tolist(), ends)
    result.accepted_lengths["chain"] = decoding.accepted_length(_chain(result.depth))
    for nodes in TREE_SIZES:
        name, start = str(nodes), result.best_tree(nodes)
        result.trees[name], result.accepted_lengths[name] = decoding.search_tree(start, nodes)
    return result


@dataclass(frozen=True)
class DecodingSimulation:
    """Simulate greedy decoding along the measured text."""

    paths: list[Path]  # the distinct rank paths
    kinds: list[int]  # per anchor, the index of its path
    ends: list[int]  # per anchor, the index after the last anchor of its answer

    def passes(self, tree: Iterable[Sequence[int]]) -> list[int]:
        """Return the anchors at which decoding with this tree has its passes; the first, over the prompt, gives one token."""
        nodes, starts = {tuple(path) for path in tree} | {()}, {0, *self.ends}
        accepted = [max(n for n in range(len(path) + 1) if path[:n] in nodes) for path in self.paths]
        visited, at = [], 0
        while at < len(self.kinds):
            visited.append(at)
            at = min(at + 1 + (0 if at in starts else accepted[self.kinds[at]]), self.ends[at])
        return visited

    def accepted_length(self, tree: Iterable[Sequence[int]]) -> float:
        """Return the tokens per verify pass with this tree; every anchor is one token."""
        return len(self.kinds) / len(self.passes(tree))

    def search_tree(self, tree: Tree, nodes: int) -> tuple[Tree, float]:
        """Return the tree with the largest accepted length that the search finds from `tree`, and this length.

        Each round takes the best tree for the anchors at which decoding with all earlier trees had its passes.
        """
        best, best_length = tree, 0.0
        visited: Counter[Path] = Counter()
        for _ in range(SEARCH_ROUNDS):
            passes = self.passes(tree)
            length = len(self.kinds) / len(passes)
            if length > best_length:
                best, best_length = tree, length
            visited.update(self.paths[self.kinds[at]] for at in passes)
            tree = _best_paths(_prefix_counts(visited), nodes)
        return best, best_length


def _prefix_counts(paths: dict[Path, int]) -> dict[Path, int]:
    counts: Counter[Path] = Counter()
    for path, count in paths.items():
        for length in range(len(path) + 1):
            counts[path[:length]] += count
    return dict(counts)


def _best_paths(prefix_counts: dict[Path, int], nodes: int) -> Tree:
    ordered = sorted(prefix_counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    best = [path for path, _ in ordered if path][: nodes - 1] or [(0,)]
    return [list(path) for path in sorted(best, key=lambda path: (len(path), path))]


def _chain(depth: int) -> Tree:
    return [[0] * (length + 1) for length in range(depth)]
