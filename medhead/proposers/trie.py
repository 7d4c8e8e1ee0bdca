"""The draft tokens of one row as a trie, made on the host: a node is the path of tokens that leads to it.

Tries of several sources can be merged and pruned, and become a token tree, or `Candidates` as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medhead.core.tree import TokenTree


class DraftTrie:
    """A trie below one root; a parent comes before its children.

    Attributes:
        tokens: token ids; the first is the root.
        parents: index of every node's parent; the root is its own.
        depths: distance from the root.
        probs: estimated probability, above 0 and at most 1, that the whole path to the node is accepted; 1 for the root, and
            at most the parent's. Estimates of different proposers are not calibrated to each other.
    """

    def __init__(self, root: int) -> None:
        self.tokens, self.parents, self.depths, self.probs = [int(root)], [0], [0], [1.0]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, prob: float) -> int:
        """Return the node `token` below `parent`, added if it is new; an existing node keeps the larger probability."""
        node = self._children.get((parent, token))
        prob = min(prob, self.probs[parent])
        if node is None:
            node = self._children[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self.probs.append(prob)
        elif prob > self.probs[node]:
            self.probs[node] = prob
        return node

    def prune(self, nodes: int) -> DraftTrie:
        """Return the `nodes` most probable nodes, root included; of equal ones the shallower, then the older, are kept."""
        if len(self) <= nodes:
            return self
        order = sorted(range(1, len(self)), key=lambda node: (-self.probs[node], self.depths[node], node))
        kept, places = DraftTrie(self.tokens[0]), {0: 0}
        for node in sorted(order[: nodes - 1]):
            places[node] = kept.add(places[self.parents[node]], self.tokens[node], self.probs[node])
        return kept

    def merge(self, other: DraftTrie) -> None:
        """Add the nodes of another trie of the same root; probabilities a and b of one path become 1 - (1 - a)(1 - b)."""
        places = [0]
        for parent, token, prob in zip(other.parents[1:], other.tokens[1:], other.probs[1:], strict=True):
            known = self._children.get((places[parent], token))
            if known is not None:
                prob = 1 - (1 - prob) * (1 - self.probs[known])
            places.append(self.add(places[parent], token, prob))


def to_token_tree(tries: Sequence[DraftTrie], roots: Tensor) -> TokenTree:
    """Return one batch of trees; a row with fewer nodes repeats its root below the root, which changes no output."""
    nodes = max(map(len, tries))
    if nodes == 1:
        return TokenTree.root(roots)
    padded = torch.empty(3, len(tries), nodes, dtype=torch.long)
    for row, trie in enumerate(tries):
        missing = nodes - len(trie)
        columns = (trie.tokens + trie.tokens[:1] * missing, trie.parents + [0] * missing, trie.depths + [1] * missing)
        padded[:, row] = torch.tensor(columns)
    tokens, parents, depth = padded.to(roots.device)
    return TokenTree(tokens, parents, depth, max(max(trie.depths) for trie in tries))
