"""Plain decoding: the same loop with a tree of one node."""

from __future__ import annotations

from typing import Any

from medhead.proposers.base import Proposer, register_proposer


@register_proposer("none")
class PlainProposer(Proposer):
    """Proposes nothing but the root. It accepts a tree size, as all proposers do, and ignores it."""

    capturable = True

    def __init__(self, target: Any = None, **options: Any) -> None:
        self.tree_size = 1
