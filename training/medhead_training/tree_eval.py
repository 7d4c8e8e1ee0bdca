"""Paths of ranks, counted, and the static trees that follow from them.

The ranks that the true tokens behind one anchor have among the heads' guesses are a path of ranks. Counting whole
paths says what a static tree is worth without assuming, as Medusa's search does, that depths are right independently.

The mean over all anchors is still more than decoding gets: it jumps over the tokens that were guessed, so it stands
more often where guessing is hard. So decoding is followed along the text, pass by pass, and trees are made for the
anchors that it visits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.proposers.static_tree import best_static_tree

NODES = (8, 16, 32, 64)  # sizes of the trees that are kept
MISSED, UNREACHED = -1, -2  # in place of a rank: the token was not named; the text has no token there
ROUNDS = 8  # of finding a tree for the anchors that decoding visits

Path = tuple[int, ...]
Tree = list[list[int]]


@dataclass
class Measured:
    """What heads did on held-out text.

    Attributes:
        anchors: number of them; each stands for one token of the text that decoding would emit.
        ranks: ranks that were told apart; what lies behind them is missed.
        reached: at depth d+1, anchors whose text goes on that far.
        accuracies: `accuracies[d][r]`, share of these at which the rank-r guess of depth d+1 was right.
        paths: the paths of ranks that happened, each cut at its first miss or where the text ended, and how often.
        trees: static trees by number of nodes, as `HeadsProposer(shape=...)` takes them: the best found for decoding the text.
        walked: tokens per pass when the text is decoded with each of `trees`, and with the first guesses only (`chain`). This
            is what to expect of greedy decoding; `length` is more, since it is the mean over all anchors.
    """

    anchors: int
    ranks: int
    reached: list[int]
    accuracies: list[list[float]]
    paths: dict[Path, int]
    trees: dict[str, Tree] = field(default_factory=dict)
    walked: dict[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Depths that were measured."""
        return len(self.accuracies)

    def top(self, ranks: int) -> list[float]:
        """At every depth, how often one of the first `ranks` guesses was right."""
        return [sum(row[:ranks]) for row in self.accuracies]

    @cached_property
    def begun(self) -> dict[Path, int]:
        """How many anchors have ranks that begin with a path, for every path that happened; `()` is all."""
        return _begun(self.paths)

    def value(self, path: Sequence[int]) -> float:
        """Share of anchors whose ranks begin with `path`: what a node of a static tree adds to the accepted length."""
        return self.begun.get(tuple(path), 0) / self.anchors

    def length(self, tree: Iterable[Sequence[int]]) -> float:
        """Accepted length of a tree as the mean over all anchors: 1 for the target's own token, and the nodes' values."""
        return 1.0 + sum(self.value(path) for path in tree)

    def best_tree(self, nodes: int) -> Tree:
        """The static tree of at most `nodes` nodes, root included, with the largest `length`.

        No path is worth more than its beginning, so the best `nodes - 1` paths hold all their beginnings; of equal ones the
        shorter goes first, then the lower ranks. Paths that never happened are left out, but a tree has at least one.

        Raises:
            MedheadError: fewer than two nodes.
        """
        if nodes < 2:
            raise MedheadError(f"a static tree needs at least 2 nodes, got {nodes}")
        return _best(self.begun, nodes)

    def chain(self) -> float:
        """`length` when only the first guess of every depth is tried."""
        return self.length(_chain(self.depth))

    def independent(self, nodes: int) -> tuple[Tree, float]:
        """The tree that `best_static_tree` makes of the accuracies, and its length if depths were independent.

        That texts end is part of both this length and the true one (`length` of the same tree).
        """
        alive = [now / max(before, 1) for before, now in zip([self.anchors, *self.reached], self.reached, strict=False)]
        rates = [[alive[depth] * rate for rate in row] for depth, row in enumerate(self.accuracies)]
        tree, total = best_static_tree(rates, nodes), 1.0
        for path in tree:
            value = 1.0
            for depth, rank in enumerate(path):
                value *= rates[depth][rank]
            total += value
        return tree, total

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; `lengths` is there for the reader, the rest for `from_dict`."""
        lengths = {nodes: round(self.length(tree), 4) for nodes, tree in self.trees.items()}
        return {
            "anchors": self.anchors,
            "ranks": self.ranks,
            "reached": self.reached,
            "accuracies": self.accuracies,
            "lengths": lengths | {"chain": round(self.chain(), 4)},
            "walked": self.walked,
            "trees": self.trees,
            "paths": {",".join(map(str, path)): count for path, count in self.paths.items()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measured:
        """What `to_dict` made."""
        fields = {name: value for name, value in data.items() if name not in ("lengths", "paths")}
        paths = {tuple(map(int, path.split(","))) if path else (): n for path, n in data["paths"].items()}
        return cls(**fields, paths=paths)


def summarise(found: Tensor, last: Tensor, ranks: int) -> Measured:
    """Everything that is counted, from ranks `[anchors, depth]` and which anchors `[anchors]` end a stretch of text."""
    reached = (found != UNREACHED).cumprod(1).bool()  # behind a gap another turn begins: not of this path
    seen = reached.sum(0)
    hits = torch.stack([((found == rank) & reached).sum(0) for rank in range(ranks)], 1)  # [depth, ranks]
    right = (found >= 0).cumprod(1).bool()
    unique, kind, counts = found.masked_fill(~right, MISSED).unique(dim=0, return_inverse=True, return_counts=True)
    paths = [tuple(rank for rank in row if rank >= 0) for row in unique.tolist()]
    measured = Measured(
        anchors=len(found),
        ranks=ranks,
        reached=seen.tolist(),
        accuracies=[
            [round(n / max(of, 1), 5) for n in row] for row, of in zip(hits.tolist(), seen.tolist(), strict=True)
        ],
        paths=dict(zip(paths, counts.tolist(), strict=True)),
    )
    index = torch.arange(len(last))
    ends = torch.where(last, index + 1, len(last)).flip(0).cummin(0).values.flip(0).tolist()
    walk = Walk(paths, kind.tolist(), ends)
    measured.walked["chain"] = walk.length(_chain(measured.depth))
    for nodes in NODES:
        measured.trees[str(nodes)], measured.walked[str(nodes)] = walk.best_tree(measured.best_tree(nodes), nodes)
    return measured


class Walk:
    """Decoding along the measured text.

    Args:
        paths: the different paths of ranks.
        kinds: which of them an anchor has.
        ends: before which anchor an anchor's text ends.
    """

    def __init__(self, paths: list[Path], kinds: list[int], ends: list[int]) -> None:
        self.paths, self.kinds, self.ends = paths, kinds, ends

    def visits(self, tree: Iterable[Sequence[int]]) -> list[int]:
        """Anchors at which decoding with a tree has its passes. Every anchor is a token: their number is the text's length."""
        nodes = {tuple(path) for path in tree} | {()}
        accepted = [max(n for n in range(len(path) + 1) if path[:n] in nodes) for path in self.paths]
        visited, at = [], 0
        while at < len(self.kinds):
            visited.append(at)
            at = min(at + 1 + accepted[self.kinds[at]], self.ends[at])
        return visited

    def length(self, tree: Iterable[Sequence[int]]) -> float:
        """Tokens per pass."""
        return len(self.kinds) / len(self.visits(tree))

    def best_tree(self, tree: Tree, nodes: int) -> tuple[Tree, float]:
        """A tree that decodes the text in few passes, and its tokens per pass.

        From tree to tree: the next one is the best for all anchors at which decoding with the ones before had its passes. What
        decodes fastest of them is returned, so it is never worse than the one to begin with.
        """
        best, most = tree, 0.0
        visited: Counter[Path] = Counter()
        for _ in range(ROUNDS):
            passes = self.visits(tree)
            if len(self.kinds) / len(passes) > most:
                best, most = tree, len(self.kinds) / len(passes)
            visited.update(self.paths[self.kinds[at]] for at in passes)
            tree = _best(_begun(visited), nodes)
        return best, most


def _begun(paths: dict[Path, int]) -> dict[Path, int]:
    """How many of the counted paths begin with a path."""
    counts: Counter[Path] = Counter()
    for path, count in paths.items():
        for length in range(len(path) + 1):
            counts[path[:length]] += count
    return dict(counts)


def _best(begun: dict[Path, int], nodes: int) -> Tree:
    """See `Measured.best_tree`."""
    ordered = sorted(begun.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    best = [path for path, _ in ordered if path][: nodes - 1] or [(0,)]
    return [list(path) for path in sorted(best, key=lambda path: (len(path), path))]


def _chain(depth: int) -> Tree:
    return [[0] * (length + 1) for length in range(depth)]
