"""The three sizes of lookahead decoding: what they cost, what fits a tree, and what the tuner found to be fastest here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from medhead import user_cache
from medhead.errors import MedheadError

if TYPE_CHECKING:
    from medhead.model.target import Target

MOST_NODES = 256


class Sizes(NamedTuple):
    """W, N and G, see `LookaheadProposer`."""

    window: int
    ngram: int
    guesses: int

    def __str__(self) -> str:
        return f"W {self.window}, N {self.ngram}, G {self.guesses} ({nodes_needed(*self)} nodes)"


DEFAULTS = Sizes(5, 4, 5)  # 30 nodes


def nodes_needed(window: int, ngram: int, guesses: int) -> int:
    """Most nodes of a tree with such a window, root included; the window's first passes count too."""
    levels, most = ngram - 1, 0
    for filled in range(1, levels + 1):
        most = max(most, filled * (window + levels - filled))
    return most + guesses * levels


def fit(asked: tuple[int | None, int | None, int | None], limit: int, defaults: bool) -> Sizes:
    """W, N and G that fit: what was asked for, the defaults if there is room, else less.

    Args:
        asked: what was asked for; None where it may be chosen.
        limit: most nodes.
        defaults: whether nothing larger than the defaults is chosen.

    Raises:
        MedheadError: what was asked for does not fit.
    """
    window, ngram, guesses = asked
    for n in [ngram] if ngram else [DEFAULTS[1], 3, 2]:
        least = DEFAULTS[0] if defaults else max(limit, 1)
        for size in range(min(least, 256), 0, -1):
            w, g = window or size, guesses or size
            if limit == 1 or nodes_needed(w, n, g) <= limit:
                return Sizes(w, n, g)
    w, n, g = window or 1, ngram or 2, guesses or 1
    raise MedheadError(
        f"lookahead with W={w}, N={n}, G={g} needs {nodes_needed(w, n, g)} nodes, the tree has at most {limit}; "
        "make them smaller"
    )


def tuned_sizes(target: Target) -> Sizes | None:
    """What `medhead.tune --proposer lookahead` found for this model, type, device and number of threads; None if nothing."""
    return user_cache.read(_file(target), _parse, "lookahead has its usual sizes")


def store_sizes(target: Target, sizes: Sizes) -> Path | None:
    """Keep sizes in the user's cache; returns the file, or None if it cannot be written."""
    file = _file(target)
    return file if user_cache.write(file, sizes._asdict()) else None


def _file(target: Target) -> Path:
    return user_cache.cache_folder() / f"{user_cache.fingerprint(target, 1)}-lookahead.json"


def _parse(content: Any) -> Sizes:
    found = Sizes(**content)
    if not all(type(size) is int for size in found) or found.window < 1 or found.ngram < 2 or found.guesses < 1:
        raise ValueError("sizes that cannot be")
    if nodes_needed(*found) > MOST_NODES:
        raise ValueError(f"more than {MOST_NODES} nodes")
    return found
