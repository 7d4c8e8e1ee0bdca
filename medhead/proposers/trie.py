"""DraftTrie for one row, made on the host: paths of tokens below the root, each with the chance it is given.

They are kept as a trie, so that paths share their beginnings: a node is the path that leads to it. DraftTrie from several
sources can be merged, and the likeliest become a token tree; as tensors they are `Candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medhead.core.tree import TokenTree


class DraftTrie:
    """A trie below one root, parents before their children.

    Attributes:
        tokens: token ids; the first is the root.
        parents: index of every node's parent; the root is its own.
        depths: distance from the root.
        chances: estimated probability, above 0 and at most 1, that the whole path to the node is accepted; 1 for the
            root, and never more than the parent's. Estimates of different proposers are not calibrated to each other.
    """

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.depths, self.probs = [int(root)], [0], [0], [1.0]
        self._below: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, prob: float) -> int:
        """The node `token` below `parent`, made if it is new; a node that is there keeps the larger chance."""
        node = self._below.get((parent, token))
        prob = min(prob, self.probs[parent])
        if node is None:
            node = self._below[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.probs.append(prob)
        elif prob > self.probs[node]:
            self.probs[node] = prob
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The node `token` below `parent`, None if there is none."""
        return self._below.get((parent, token))

    def paths(self) -> list[tuple[tuple[int, ...], float]]:
        """Every node but the root as the tokens that lead to it and its chance."""
        found: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for node in range(1, len(self)):
            found.append(((*found[self.parents[node]][0], self.tokens[node]), self.probs[node]))
        return found[1:]

    def likeliest(self, nodes: int) -> DraftTrie:
        """The `nodes` likeliest nodes, root included; ties go to what was named first, so a parent is never left out."""
        if len(self) <= nodes:
            return self
        order = sorted(range(1, len(self)), key=lambda node: (-self.probs[node], self.depths[node], node))
        kept, places = DraftTrie(self.tokens[0]), {0: 0}
        for node in sorted(order[: nodes - 1]):
            places[node] = kept.add(places[self.parents[node]], self.tokens[node], self.probs[node])
        return kept

    def merge(self, other: DraftTrie) -> None:
        """Take in another proposer's candidates for the same root; both are right with 1 - (1 - a)(1 - b)."""
        places = [0]
        for node in range(1, len(other)):
            parent_index, token, prob = places[other.parents[node]], other.tokens[node], other.probs[node]
            here = self.child(parent_index, token)
            both = prob if here is None else 1 - (1 - prob) * (1 - self.probs[here])
            places.append(self.add(parent_index, token, both))


def to_token_tree(rows: Sequence[DraftTrie], roots: Tensor) -> TokenTree:
    """One batch of trees; a row with fewer nodes repeats its root below the root, which costs and changes nothing."""
    nodes = max(map(len, rows))
    if nodes == 1:
        return TokenTree.root(roots)
    padded = torch.empty(3, len(rows), nodes, dtype=torch.long)
    for place, row in enumerate(rows):
        missing = nodes - len(row)
        columns = (row.tokens + row.tokens[:1] * missing, row.parents + [0] * missing, row.depths + [1] * missing)
        padded[:, place] = torch.tensor(columns)
    tokens, parents, depth = padded.to(roots.device)
    return TokenTree(tokens, parents, depth, max(max(row.depths) for row in rows))
