"""Lookahead decoding (Fu et al. 2024): the target predicts its own future in the pass that verifies the draft tokens.

Names are those of the paper: W columns, N tokens in an n-gram, G n-grams verified at a time. The window has N - 1 levels. With
the root at position p, column i of level l predicts the token at position p + l + i; column 0 of level 0 is the root itself.
Each pass gives the next token after the last level. That completes an n-gram per column; the levels move up by one, and the new
tokens are the last level (parallel Jacobi iterations of all columns).

Window and n-grams are one token tree: level 0 is a chain below the root, and column i of level l is a child of column i of level
l - 1. A node's ancestors are then what the paper's mask shows it. A window node may be accepted like any node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import torch

from medhead.core.acceptance import gather_path
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates, candidates_from_tries
from medhead.proposers.lookahead_sizes import DEFAULTS, MAX_NODES, choose_sizes, nodes_needed, tuned_sizes
from medhead.proposers.trie import DraftTrie, to_token_tree

if TYPE_CHECKING:
    from medhead.model.target import Target

Gram = tuple[int, ...]


@dataclass
class Window:
    """One row's window.

    Attributes:
        depth: N - 1, number of levels of the full window.
        levels: tokens of every level, level 0 without its column 0. At first there is one level of W + N - 3 tokens of any kind:
            each of the first passes adds a level and removes a column, until there are N - 1 levels of W columns.
    """

    depth: int
    levels: list[list[int]]

    def advance(self, root: int, answers: Sequence[int]) -> list[Gram]:
        """Take the target's token after each column of the last level; return the complete n-grams."""
        levels, newest = self.levels, list(answers)
        if len(levels) < self.depth:
            self.levels = [level[1:] for level in [*levels, newest]]
            return []
        moved = [*levels[1:], newest]
        self.levels = [moved[0][1:], *moved[1:]]
        return list(zip([root, *levels[0]], *moved, strict=True))


@dataclass
class Pool:
    """n-grams by their first token, of each first token the newest `kept`."""

    kept: int
    _after: dict[int, dict[Gram, None]] = field(default_factory=dict)

    def add(self, gram: Sequence[int]) -> None:
        """Add an n-gram as the newest of its first token."""
        first, rest = gram[0], tuple(gram[1:])
        known = self._after.setdefault(first, {})
        known.pop(rest, None)
        known[rest] = None
        if len(known) > self.kept:
            del known[next(iter(known))]

    def after(self, token: int) -> list[Gram]:
        """Return what followed a token, newest first."""
        return list(reversed(self._after.get(token, {})))


@dataclass
class LookaheadRow:
    """What lookahead keeps of one row.

    Attributes:
        last_level: nodes of the window's last level in the tree being verified; empty if the window is not in the tree.
        tokens_read: number of tokens of the text whose n-grams are in the pool.
    """

    pool: Pool
    window: Window
    last_level: list[int] = field(default_factory=list)
    tokens_read: int = 0


@register_proposer("lookahead")
class LookaheadProposer(Proposer):
    """Proposes n-grams of the prompt, of the output, and of what the target predicted in its window.

    Args:
        target: the target; its tuned W, N and G are used if no option below is given.
        tree_size: largest number of nodes of the tree, root included. Of W, N and G those not given are chosen to fit it.
        window: W, number of columns of the window, at least 1 (default: tuned, else 5).
        ngram: N, tokens of an n-gram, at least 2 (default: tuned, else 4). A pass accepts at most N - 1 of its tokens.
        guess_set: G, n-grams verified at a time and kept for each first token, at least 1 (default: tuned, else 5).

    Raises:
        MedheadError: W, N or G is out of range, or they need more nodes than the tree may have.
    """

    reads_nodes = True

    row_states: list[LookaheadRow]

    def __init__(
        self,
        target: Target | None = None,
        tree_size: int | None = None,
        window: int | None = None,
        ngram: int | None = None,
        guess_set: int | None = None,
    ) -> None:
        for name, value, low in (("W (window)", window, 1), ("N (ngram)", ngram, 2), ("G (guess_set)", guess_set, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise MedheadError(f"lookahead needs a whole number {name} of at least {low}, got {value!r}")
        self.tree_size = limit = MAX_NODES if tree_size is None else tree_size
        if target is not None and tree_size is window is ngram is guess_set is None:
            window, ngram, guess_set = tuned_sizes(target) or DEFAULTS
        self.window, self.ngram, self.guess_set = choose_sizes(window, ngram, guess_set, limit, tree_size is None)
        self.tree_size = 1 if limit == 1 else nodes_needed(self.window, self.ngram, self.guess_set)
        self.window_depth = self.window + self.ngram - 3
        self.max_depth = 0 if limit == 1 else max(self.ngram - 1, self.window_depth)
        self._state: DecodeState | None = None

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """Start with empty pools, and with windows of random tokens of the prompts."""
        self.row_states = [
            LookaheadRow(Pool(self.guess_set), Window(self.ngram - 1, [self.first_level(text)])) for text in texts
        ]

    def first_level(self, text: list[int]) -> list[int]:
        """Return the tokens that a window starts with, the same for the same prompt."""
        return Random(len(text)).choices(text, k=self.window + self.ngram - 3)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """Return the n-grams of all rows as candidates."""
        return candidates_from_tries(self.tries(state, max_depth), state.roots.device)

    def tries(self, state: DecodeState, max_depth: int) -> list[DraftTrie]:
        """Return the n-grams after every root, of probabilities 2/3 per token, times 1, 1/2, 1/3, ... from the newest one."""
        self._read_texts(state)
        tries = [DraftTrie(text[-1]) for text in state.texts]
        for trie, row in zip(tries, self.row_states, strict=True):
            _add_ngrams(trie, row.pool, max_depth)
        return tries

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Return the window and the n-grams of every row; where the window is too deep, near the end, it is left out."""
        self._read_texts(state)
        self._state = state
        has_window = self.tree_size > 1 and max_depth >= self.window_depth
        tries = [DraftTrie(text[-1]) for text in state.texts]
        for trie, row in zip(tries, self.row_states, strict=True):
            row.last_level = _add_window(trie, row.window) if has_window else []
            _add_ngrams(trie, row.pool, min(max_depth, self.max_depth))
        return to_token_tree(tries, state.roots)

    def update(self, output: VerifyOutput) -> None:
        """Advance the windows by the tokens that the target draws at their last levels."""
        if not any(row.last_level for row in self.row_states):
            return
        assert self._state is not None
        longest = max(len(row.last_level) for row in self.row_states)  # windows of rows that joined later are smaller
        padded = [row.last_level + [0] * (longest - len(row.last_level)) for row in self.row_states]
        nodes = torch.tensor(padded, device=output.logits.device)
        logits = gather_path(output.logits, nodes)
        if self._state.noise is not None:
            noise = self._state.noise.prefix(output.tree.max_depth + 1)
            logits = logits.float() / self._state.temperature + gather_path(noise, output.tree.depth.gather(1, nodes))
        roots = output.tree.tokens[:, 0].tolist()
        for row, root, answers in zip(self.row_states, roots, logits.argmax(-1).tolist(), strict=True):
            for gram in row.window.advance(root, answers[: len(row.last_level)]):
                row.pool.add(gram)

    def _read_texts(self, state: DecodeState) -> None:
        """Add the n-grams of what the texts have gained to the pools."""
        for row, text in zip(self.row_states, state.texts, strict=True):
            for end in range(max(row.tokens_read + 1, self.ngram), len(text) + 1):
                row.pool.add(text[end - self.ngram : end])
            row.tokens_read = len(text)


def _add_ngrams(trie: DraftTrie, pool: Pool, max_depth: int) -> None:
    for rank, gram in enumerate(pool.after(trie.tokens[0])):
        node = 0
        for depth, token in enumerate(gram[:max_depth], 1):
            node = trie.add(node, token, (2 / 3) ** depth / (rank + 1))


def _add_window(trie: DraftTrie, window: Window) -> list[int]:
    """Add a window's nodes, with no estimate of their probabilities; return those of its last level by column."""
    nodes = [0]
    for token in window.levels[0]:
        nodes.append(trie.add(nodes[-1], token, 1.0))
    for level in window.levels[1:]:
        nodes = [trie.add(parent, token, 1.0) for parent, token in zip(nodes, level, strict=True)]
    return nodes
