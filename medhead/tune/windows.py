"""Sizes of lookahead decoding: the settings that are tried."""

from __future__ import annotations

from collections.abc import Iterator

from medhead.proposers.lookahead_sizes import MAX_NODES, Sizes, nodes_needed
from medhead.tune.search import Changes

NGRAMS = (2, 3, 4, 5, 6)
WINDOWS = (1, 2, 3, 5, 8, 12, 20)
GUESS_SETS = (1, 2, 3, 5, 8, 12, 20)


def dimensions() -> Iterator[Changes[Sizes]]:
    """Yield the changes to try, one dimension after the other; a change to too many nodes is none."""
    for name, values in (("ngram", NGRAMS), ("window", WINDOWS), ("guess_set", GUESS_SETS)):
        yield [lambda sizes, name=name, value=value: _changed(sizes, name, value) for value in values]  # type: ignore[misc]


def _changed(sizes: Sizes, name: str, value: int) -> Sizes:
    after = sizes._replace(**{name: value})
    return after if nodes_needed(*after) <= MAX_NODES else sizes
