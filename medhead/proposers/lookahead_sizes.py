"""The sizes W, N and G of lookahead decoding: the nodes they need, the choice for a tree size, and the tuned ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medhead import user_cache
from medhead.config import MAX_TREE_SIZE
from medhead.errors import MedheadError

if TYPE_CHECKING:
    from medhead.model.target import Target

MAX_NODES = MAX_TREE_SIZE


class Sizes(NamedTuple):
    """W, N and G, see `LookaheadProposer`."""

    window: int
    ngram: int
    guess_set: int

    def __str__(self) -> str:
        return f"W {self.window}, N {self.ngram}, G {self.guess_set} ({nodes_needed(*self)} nodes)"


DEFAULTS = Sizes(5, 4, 5)  # 30 nodes


def nodes_needed(window: int, ngram: int, guess_set: int) -> int:
    """Return the size of the largest tree with such a window, root included; the window's first passes count too."""
    levels = ngram - 1
    return max(filled * (window + levels - filled) for filled in range(1, levels + 1)) + guess_set * levels


def choose_sizes(
    window: int | None, ngram: int | None, guess_set: int | None, limit: int, at_most_defaults: bool
) -> Sizes:
    """Return the given sizes, None replaced by the largest values, at most the defaults if asked, that fit `limit` nodes.

    Raises:
        MedheadError: the given sizes do not fit.
    """
    for n in [ngram] if ngram else [DEFAULTS.ngram, 3, 2]:
        for size in range(DEFAULTS.window if at_most_defaults else min(max(limit, 1), MAX_NODES), 0, -1):
            sizes = Sizes(window or size, n, guess_set or size)
            if limit == 1 or nodes_needed(*sizes) <= limit:
                return sizes
    w, n, g = window or 1, ngram or 2, guess_set or 1
    raise MedheadError(
        f"lookahead with W={w}, N={n}, G={g} needs {nodes_needed(w, n, g)} nodes, the tree has at most {limit}; "
        "make them smaller"
    )


def tuned_sizes(target: Target) -> Sizes | None:
    """Return the sizes tuned for this model, type, device and number of threads; None if there are none."""
    return user_cache.read(_file(target), _parse, "lookahead uses its default sizes")


def store_sizes(target: Target, sizes: Sizes) -> Path | None:
    """Store sizes in the user's cache; return the file, or None if it cannot be written."""
    file = _file(target)
    return file if user_cache.write(file, sizes._asdict()) else None


def _file(target: Target) -> Path:
    return user_cache.cache_folder() / f"{user_cache.fingerprint(target, 1)}-lookahead.json"


def _parse(content: Any) -> Sizes:
    found = Sizes(**content)
    if not all(type(size) is int for size in found) or found.window < 1 or found.ngram < 2 or found.guess_set < 1:
        raise ValueError("the sizes are out of range")
    if nodes_needed(*found) > MAX_NODES:
        raise ValueError(f"the sizes need more than {MAX_NODES} nodes")
    return found
