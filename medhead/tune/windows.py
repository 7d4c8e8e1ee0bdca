"""Windows of lookahead decoding: what is tried."""

from __future__ import annotations

from collections.abc import Iterator

from medhead.proposers.lookahead_sizes import MAX_NODES, Sizes, nodes_needed
from medhead.tune.search import Changes

NGRAMS = (2, 3, 4, 5, 6)
WINDOWS = (1, 2, 3, 5, 8, 12, 20)
GUESS_SETS = (1, 2, 3, 5, 8, 12, 20)


def neighbours() -> Iterator[Changes[Sizes]]:
    """What is tried, one dimension after the other; what is too large stays as it was."""
    yield [lambda s, n=n: _within(s, s._replace(ngram=n)) for n in NGRAMS]  # type: ignore[misc]
    yield [lambda s, w=w: _within(s, s._replace(window=w)) for w in WINDOWS]  # type: ignore[misc]
    yield [lambda s, g=g: _within(s, s._replace(guess_set=g)) for g in GUESS_SETS]  # type: ignore[misc]


def _within(before: Sizes, after: Sizes) -> Sizes:
    return after if nodes_needed(*after) <= MAX_NODES else before
