"""Proposers for tests, one random and one that knows the text and is wrong now and then, and the paths of a trie."""

from __future__ import annotations

import torch

from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead.proposers.base import DecodeState, Proposer
from medhead.proposers.trie import DraftTrie


def trie_paths(trie: DraftTrie) -> dict[tuple[int, ...], float]:
    """Return the tokens that lead to every node but the root, with the node's probability."""
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(trie.parents[1:], trie.tokens[1:], strict=True):
        found.append((*found[parent], token))
    return dict(zip(found[1:], trie.probs[1:], strict=True))


class RandomProposer(Proposer):
    """Random trees of random tokens: almost always wrong."""

    name = "random"

    def __init__(self, vocab: int, nodes: int = 9, seed: int = 0) -> None:
        self.vocab, self.tree_size, self.max_depth = vocab, nodes, nodes - 1
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        if max_depth < 1:
            return TokenTree.root(state.roots)
        batch = len(state.texts)
        tokens = torch.randint(0, self.vocab, (batch, self.tree_size), generator=self.generator)
        tokens[:, 0] = state.roots
        parents = torch.zeros_like(tokens)
        depth = torch.zeros_like(tokens)
        for node in range(1, self.tree_size):
            for row in range(batch):
                open_nodes = (depth[row, :node] < max_depth).nonzero()[:, 0]
                parent = open_nodes[torch.randint(0, len(open_nodes), (), generator=self.generator)]
                parents[row, node], depth[row, node] = parent, depth[row, parent] + 1
        return TokenTree.from_parents(tokens, parents)


class OracleProposer(Proposer):
    """Knows every row's full text; adds a wrong sibling to each node, and proposes a wrong token with probability `lie`."""

    name = "oracle"

    def __init__(self, texts: list[list[int]], vocab: int, depth: int = 6, lie: float = 0.25, seed: int = 0) -> None:
        self.answers, self.vocab, self.lie = texts, vocab, lie
        self.max_depth, self.tree_size = depth, 2 * depth + 1
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[int] = []

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        self.rows = list(range(len(texts)))

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        depth = min(max_depth, self.max_depth)
        tokens, parents = [], [0]
        for at in range(depth):
            parent_index = 0 if at == 0 else 2 * at  # the decoy comes first, the true node second
            parents += [parent_index, parent_index]
        for text, row in zip(state.texts, self.rows, strict=True):
            names = [text[-1]]
            for token in (self.answers[row][len(text) : len(text) + depth] + [0] * depth)[:depth]:
                lies = float(torch.rand((), generator=self.generator)) < self.lie
                names += [(token + 1) % self.vocab, (token + 2) % self.vocab if lies else token]
            tokens.append(names)
        return TokenTree.from_parents(torch.tensor(tokens), torch.tensor(parents))

    def keep_rows(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
