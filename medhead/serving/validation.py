"""Which requests an engine can serve."""

from __future__ import annotations

from medhead.core.stopping import token_limit
from medhead.errors import MedheadError
from medhead.model.target import Target
from medhead.proposers import PROPOSERS
from medhead.serving.request import Request


def check_request(request: Request, target: Target, has_heads: bool) -> None:
    """Refuse a request that this target and these proposers cannot serve.

    Raises:
        MedheadError: names the field, what was given and what is allowed.
    """
    if not request.prompt:
        raise MedheadError("the prompt is empty: give at least one token")
    vocabulary = int(target.embedding.num_embeddings)
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= vocabulary:
        raise MedheadError(f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}")
    token_limit(request.params.max_new_tokens, len(request.prompt), target.context)
    if request.proposer is not None and request.proposer not in PROPOSERS:
        raise MedheadError(f"no proposer is called {request.proposer!r}; known: {', '.join(sorted(PROPOSERS))}")
    if request.proposer == "heads" and not has_heads:
        raise MedheadError("the proposer 'heads' needs heads, and none are loaded; start with --heads")
