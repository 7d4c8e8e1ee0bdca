"""What lookahead decoding remembers: a window of the target's own guesses about the future, and the n-grams they gave.

Names are those of the paper (Fu et al. 2024): W columns, N tokens in an n-gram, G n-grams verified at a time. The window
has N - 1 levels. With the root at position p, column i of level l holds a guess for position p + l + i; column 0 of
level 0 is the root itself. Each pass asks the target at the last level what comes next: column by column that completes
an n-gram, the levels move up by one, and the answers are the new last level (parallel Jacobi iterations of all columns).
"""

from __future__ import annotations

from collections.abc import Sequence

Gram = tuple[int, ...]


class Window:
    """One row's window.

    Args:
        width: W.
        levels: N - 1.
        tokens: level 0 at the start, `width + levels - 2` tokens, any. It is wider than W because each of the first passes
            adds a level and loses a column, until there are N - 1 levels of W columns.
    """

    def __init__(self, width: int, levels: int, tokens: Sequence[int]) -> None:
        self.width, self.depth = width, levels
        self.levels = [list(tokens)]  # level 0 without its column 0

    def advance(self, root: int, answers: Sequence[int]) -> list[Gram]:
        """Take in what the target says behind each column of the last level; returns the n-grams that are complete."""
        levels, fresh = self.levels, list(answers)
        if len(levels) < self.depth:
            self.levels = [level[1:] for level in [*levels, fresh]]
            return []
        grams = list(zip([root, *levels[0]], *levels[1:], fresh, strict=True))
        moved = [*levels[1:], fresh]
        self.levels = [moved[0][1:], *moved[1:]]
        return grams


class Pool:
    """n-grams by their first token; of each first token the `kept` that were seen last."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._after: dict[int, dict[Gram, None]] = {}

    def add(self, gram: Sequence[int]) -> None:
        """EncodeCacheEntry an n-gram as the newest of its first token."""
        first, rest = gram[0], tuple(gram[1:])
        known = self._after.setdefault(first, {})
        known.pop(rest, None)
        known[rest] = None
        if len(known) > self.kept:
            del known[next(iter(known))]

    def after(self, token: int) -> list[Gram]:
        """What is known to follow a token, newest first."""
        return list(reversed(self._after.get(token, {})))

    def content(self) -> dict[int, list[Gram]]:
        """All n-grams by their first token, newest first."""
        return {token: self.after(token) for token in self._after}
