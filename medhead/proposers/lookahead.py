"""Lookahead decoding (Fu et al. 2024): the target guesses its own future in the same pass that verifies the guesses.

The window (see `window.py`) and the n-grams to verify are one token tree: level 0 is a chain below the root, and the node
above column i of level l is column i of level l - 1. A node's ancestors are then exactly what the paper's mask shows it,
and its depth is its position. Nodes with one path are one node: the target says the same behind both.

A window node may be accepted, as any node: it is kept only if its token is the one that the target draws at its parent, so
the text is plain decoding's whatever the window holds.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.base import DecodeState, Proposer, VerifyOutput, register_proposer
from medhead.proposers.candidates import Candidates, candidates_from_tries
from medhead.proposers.lookahead_sizes import DEFAULTS, MOST_NODES, fit, nodes_needed, tuned_sizes
from medhead.proposers.trie import DraftTrie, to_token_tree
from medhead.proposers.window import Pool, Window

if TYPE_CHECKING:
    from medhead.model.target import Target


@register_proposer("lookahead")
class LookaheadProposer(Proposer):
    """Proposes n-grams that the target wrote in its window, in the prompt and in the output.

    Args:
        target: the target; what the tuner found for it here is the default of W, N and G.
        tree_size: most nodes of the tree, root included. Of W, N and G those that are not given are made to fit it.
        window: W, columns of the window, at least 1 (default: tuned, else 5).
        ngram: N, tokens of an n-gram, at least 2 (default: tuned, else 4). A pass accepts at most N - 1 of its tokens.
        guesses: G, n-grams that are verified at a time and remembered for each first token, at least 1 (default: tuned, else 5).

    Raises:
        MedheadError: W, N or G cannot be, or need more nodes than the tree may have.
    """

    def __init__(
        self,
        target: Target | None = None,
        tree_size: int | None = None,
        window: int | None = None,
        ngram: int | None = None,
        guesses: int | None = None,
    ) -> None:
        for name, value, least in (("W (window)", window, 1), ("N (ngram)", ngram, 2), ("G (guesses)", guesses, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise MedheadError(f"lookahead needs a whole number {name} of at least {least}, got {value!r}")
        self.tree_size = limit = MOST_NODES if tree_size is None else tree_size
        if target is not None and tree_size is window is ngram is guesses is None:
            window, ngram, guesses = tuned_sizes(target) or DEFAULTS
        self.window, self.ngram, self.verified = fit((window, ngram, guesses), limit, tree_size is None)
        self.tree_size = 1 if limit == 1 else nodes_needed(self.window, self.ngram, self.verified)
        self.window_depth = self.window + self.ngram - 3
        self.max_depth = 0 if limit == 1 else max(self.ngram - 1, self.window_depth)
        self.pools: list[Pool] = []
        self.windows: list[Window] = []
        self._read: list[int] = []
        self._last: list[
            list[int]
        ] = []  # of every row the nodes of the window's last level, in the tree being verified
        self._state: DecodeState | None = None

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        """New pools, seeded from the prompts, and windows of random tokens of the prompts."""
        self.pools = [Pool(self.verified) for _ in texts]
        self.windows = [Window(self.window, self.ngram - 1, self.first_level(text)) for text in texts]
        self._read = [0] * len(texts)

    def first_level(self, text: list[int]) -> list[int]:
        """Tokens a window starts with, the same for the same prompt."""
        return Random(len(text)).choices(text, k=self.window + self.ngram - 3)

    def _read_text(self, state: DecodeState) -> None:
        """The pools take in what the texts have gained."""
        for row, (pool, text) in enumerate(zip(self.pools, state.texts, strict=True)):
            for end in range(max(self._read[row] + 1, self.ngram), len(text) + 1):
                pool.add(text[end - self.ngram : end])
            self._read[row] = len(text)

    def candidates(self, state: DecodeState, max_depth: int) -> Candidates | None:
        """The n-grams of all rows."""
        return candidates_from_tries(self.guesses(state, max_depth), state.roots.device)

    def guesses(self, state: DecodeState, max_depth: int) -> list[DraftTrie]:
        """The n-grams behind every root, newest first; the chances are 2/3 a token and 1/2, 1/3, ... for each older one.

        The window is left out: it is there to be continued, not to be accepted.
        """
        self._read_text(state)
        return [
            self._guess(DraftTrie(text[-1]), pool, max_depth)
            for pool, text in zip(self.pools, state.texts, strict=True)
        ]

    def _guess(self, found: DraftTrie, pool: Pool, max_depth: int) -> DraftTrie:
        for rank, gram in enumerate(pool.after(found.tokens[0])):
            node = 0
            for depth, token in enumerate(gram[:max_depth], 1):
                node = found.add(node, token, (2 / 3) ** depth / (rank + 1))
        return found

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        """Window and guesses of every row. Where the window would be too deep (the end is near) it waits."""
        self._read_text(state)
        self._state, self._last = state, []
        looks = self.tree_size > 1 and max_depth >= self.window_depth
        rows = []
        for pool, window, text in zip(self.pools, self.windows, state.texts, strict=True):
            row = DraftTrie(text[-1])
            if looks:
                self._last.append(_place(row, window))
            rows.append(self._guess(row, pool, min(max_depth, self.max_depth)))
        return to_token_tree(rows, state.roots)

    def update(self, verified: VerifyOutput) -> None:
        """Read what the target says at the window's last level, as it would draw it there."""
        if not self._last:
            return
        tokens, answers = verified.tree.tokens, self._answers(verified)
        roots = tokens[:, 0].tolist()
        for pool, window, root, fresh in zip(self.pools, self.windows, roots, answers, strict=True):
            for gram in window.advance(root, fresh):
                pool.add(gram)

    def _answers(self, verified: VerifyOutput) -> list[list[int]]:
        """`[batch][columns]`: the target's token behind each node of the last level."""
        assert self._state is not None
        longest = max(map(len, self._last))  # rows that joined later have younger windows
        padded = [nodes + [0] * (longest - len(nodes)) for nodes in self._last]
        nodes = torch.tensor(padded, device=verified.logits.device)
        logits = _take(verified.logits, nodes)
        if self._state.noise is not None:
            depth = verified.tree.depth.gather(1, nodes)
            logits = logits.float() / self._state.temperature + _take(
                self._state.noise.prefix(verified.tree.max_depth + 1), depth
            )
        answers: list[list[int]] = logits.argmax(-1).tolist()
        return [row[: len(nodes)] for row, nodes in zip(answers, self._last, strict=True)]

    def keep_rows(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.pools, self.windows = [self.pools[row] for row in rows], [self.windows[row] for row in rows]
        self._read = [self._read[row] for row in rows]

    def merge(self, newcomers: LookaheadProposer) -> None:
        """Their pools and windows join."""
        self.pools, self.windows = self.pools + newcomers.pools, self.windows + newcomers.windows
        self._read = self._read + newcomers._read


def _place(row: DraftTrie, window: Window) -> list[int]:
    """Put a window's nodes below the root; returns those of its last level by column.

    Chances are not estimated for them.
    """
    nodes = [0]
    for token in window.levels[0]:
        nodes.append(row.add(nodes[-1], token, 1.0))
    for level in window.levels[1:]:
        nodes = [row.add(parent_index, token, 1.0) for parent_index, token in zip(nodes, level, strict=True)]
    return nodes


def _take(values: Tensor, index: Tensor) -> Tensor:
    """`[batch, n, vocab]` at `index` `[batch, n]` of `[batch, m, vocab]`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
