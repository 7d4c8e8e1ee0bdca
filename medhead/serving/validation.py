"""Which requests can be served, and a clear line for those that cannot."""

from __future__ import annotations

from typing import Any

from medhead.core.stopping import token_limit
from medhead.errors import MedheadError
from medhead.generate_options import check_seed
from medhead.model.target import Target
from medhead.proposers import PROPOSERS
from medhead.proposers.base import check_tree_size
from medhead.serving.request import Request


def check_request(request: Request, target: Target, has_heads: bool) -> None:
    """Refuse what cannot be.

    Raises:
        MedheadError: names the field, what was given and what is expected.
    """
    if not request.prompt:
        raise MedheadError("the prompt is empty: give at least one token")
    rows = int(target.embedding.num_embeddings)
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= rows:
        raise MedheadError(f"token id {low if low < 0 else high} is outside the model's vocabulary of {rows}")
    _check_whole("max_new_tokens", request.max_new_tokens)
    token_limit(request.max_new_tokens, len(request.prompt), target.context)
    _check_range("temperature", request.temperature, 0, 100)
    _check_range("top_p", request.top_p, 0, 1, above=True)
    _check_range("min_p", request.min_p, 0, 1)
    if request.top_k is not None:
        _check_whole("top_k", request.top_k)
    limit = request.time_limit
    if limit is not None and not (isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0):
        raise MedheadError(f"time_limit must be a number of seconds above 0, got {limit!r}")
    if isinstance(request.stop, str) or not all(isinstance(text, str) for text in request.stop):
        raise MedheadError(f"stop must be a tuple of texts, got {request.stop!r}")
    if request.seed is not None:
        check_seed(request.seed)
    if request.tree_size is not None:
        check_tree_size(request.tree_size)
    if request.proposer is not None and request.proposer not in PROPOSERS:
        raise MedheadError(f"no proposer is called {request.proposer!r}; known: {', '.join(sorted(PROPOSERS))}")
    if request.proposer == "heads" and not has_heads:
        raise MedheadError("the proposer 'heads' needs heads, and none are loaded; start with --heads")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MedheadError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_range(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    if value is None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or (above and value == low):
        raise MedheadError(
            f"{name} must be {'above' if above else 'from'} {low} {'and at most' if above else 'to'} {high}, got {value!r}"
        )
