"""Prompt lookup: what followed the last time these words were written (Saxena 2023), as a tree of several answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, Verified, check_tree_size, register_proposer
from medhead.proposers.candidates import Candidates, candidates_from_paths
from medhead.tree import TokenTree

if TYPE_CHECKING:
    from medhead.target import Target


class NgramIndex:
    """Where every n-gram of a growing text ended most recently.

    Args:
        longest: largest n that is kept.
        recent: how many places are kept for an n-gram, newest last.
    """

    def __init__(self, longest: int, recent: int = 4) -> None:
        self.longest, self.recent = longest, recent
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._read = 0

    def extend(self, text: list[int]) -> None:
        """Take in what the text has gained. An n-gram is entered once the token behind it is known."""
        for end in range(max(self._read, 1), len(text)):
            for n in range(1, min(self.longest, end) + 1):
                places = self._places.setdefault(tuple(text[end - n : end]), [])
                places.append(end)
                if len(places) > self.recent:
                    del places[0]
        self._read = len(text)

    def continuations(self, text: list[int], depth: int) -> list[list[int]]:
        """What followed earlier occurrences of the text's end: longest match first, then newest."""
        found, seen = [], set()
        for n in range(min(self.longest, len(text)), 0, -1):
            for place in reversed(self._places.get(tuple(text[-n:]), ())):
                if place not in seen:
                    seen.add(place)
                    found.append(text[place : place + depth])
        return found


@register_proposer("ngram")
class NgramProposer(Proposer):
    """Prompt lookup over prompt and output.

    Args:
        target: the target (unused).
        tree_size: nodes of the tree, root included.
        longest: longest n-gram that is matched.
        max_depth: tokens copied at most.
    """

    def __init__(
        self, target: Target | None = None, tree_size: int = 16, longest: int = 3, max_depth: int = 10
    ) -> None:
        if longest < 1 or max_depth < 1:
            raise MedheadError(f"n-gram length and depth must be at least 1, got {longest} and {max_depth}")
        self.tree_size, self.longest = check_tree_size(tree_size), longest
        self.max_depth = min(max_depth, max(1, self.tree_size - 1))
        self._index: list[NgramIndex] = []

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Index the prompts."""
        self._index = [NgramIndex(self.longest) for _ in texts]

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Merge the continuations of every row until its tree is full."""
        depth = min(max_depth, self.max_depth)
        rows = []
        for index, text in zip(self._index, state.texts, strict=True):
            index.extend(text)
            rows.append(_merge(text[-1], index.continuations(text, depth), self.tree_size))
        return trees_from_lists(rows, state.roots)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """The continuations, the first ones likelier; how much they are worth is for a calibration to find out."""
        depth = min(max_depth, self.max_depth)
        rows = []
        for index, text in zip(self._index, state.texts, strict=True):
            index.extend(text)
            paths = index.continuations(text, depth)
            rows.append(
                [(p, [math.log(0.6) * (i + 1 + place) for i in range(len(p))]) for place, p in enumerate(paths)]
            )
        return candidates_from_paths(rows, state.roots.device)

    def observe(self, verified: Verified) -> None:
        """Nothing to learn: the text itself is read at the next proposal."""

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self._index = [self._index[row] for row in rows]


def _merge(root: int, paths: list[list[int]], nodes: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and depths of the first `nodes` nodes of a trie of paths."""
    tokens, parents, depths = [root], [0], [0]
    children: dict[tuple[int, int], int] = {}
    for path in paths:
        node = 0
        for token in path:
            below = children.get((node, token))
            if below is None:
                if len(tokens) == nodes:
                    break
                below = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                depths.append(depths[node] + 1)
            node = below
    return tokens, parents, depths


def trees_from_lists(rows: list[tuple[list[int], list[int], list[int]]], roots: Tensor) -> TokenTree:
    """One batch of trees from tokens, parents and depths of every row; shorter rows repeat their root below the root."""
    nodes = max(len(tokens) for tokens, _, _ in rows)
    if nodes == 1:
        return TokenTree.root(roots)
    padded = torch.empty(3, len(rows), nodes, dtype=torch.long)
    for row, (tokens, parents, depths) in enumerate(rows):
        missing = nodes - len(tokens)
        padded[0, row] = torch.tensor(tokens + tokens[:1] * missing)
        padded[1, row] = torch.tensor(parents + [0] * missing)
        padded[2, row] = torch.tensor(depths + [1] * missing)
    deepest = max(max(depths) for _, _, depths in rows)
    tokens, parents, depth = padded.to(roots.device)
    return TokenTree(tokens, parents, depth, deepest)
