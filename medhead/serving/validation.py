"""Which requests can be served, and a clear line for those that cannot."""

from __future__ import annotations

from medhead.core.stopping import token_limit
from medhead.errors import MedheadError
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
    token_limit(request.params.max_new_tokens, len(request.prompt), target.context)
    limit = request.time_limit
    if limit is not None and not (isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0):
        raise MedheadError(f"time_limit must be a number of seconds above 0, got {limit!r}")
    if request.tree_size is not None:
        check_tree_size(request.tree_size)
    if request.proposer is not None and request.proposer not in PROPOSERS:
        raise MedheadError(f"no proposer is called {request.proposer!r}; known: {', '.join(sorted(PROPOSERS))}")
    if request.proposer == "heads" and not has_heads:
        raise MedheadError("the proposer 'heads' needs heads, and none are loaded; start with --heads")
