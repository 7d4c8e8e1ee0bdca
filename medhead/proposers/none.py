"""Plain decoding: the same loop with a tree of one node."""

from __future__ import annotations

from typing import Any

from medhead.proposers.base import Proposer, register_proposer


@register_proposer("none")
class PlainProposer(Proposer):
    """Names nothing but the root. A tree size is accepted and means nothing."""

    capturable = True

    def __init__(self, target: Any = None, **options: Any) -> None:
        self.tree_size = 1
