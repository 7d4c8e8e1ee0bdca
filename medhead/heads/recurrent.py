"""One small recurrent cell, shared by all depths, that carries a state along each path and sees the parent's token.

In the family of ReDrafter (Cheng et al. 2024) and Hydra (Ankner et al. 2024): a node knows its parent token, which is
the largest single factor in how many guesses are right.
"""

from __future__ import annotations

from torch import Tensor, nn

from medhead.heads.base import Draft, Heads, HeadsConfig, register_kind
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import PathCell


@register_kind("recurrent")
class RecurrentHeads(Heads):
    """The state starts as the target's hidden state; every token on the path takes it through the same cell."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.cell = PathCell(config.hidden_size, config.inner_size, config.depth)
        self.output_norm = nn.LayerNorm(config.hidden_size, bias=False)

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """The hidden state itself."""
        return Draft(features, None)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """The token's part of the gates."""
        return self.cell.encode(embedding)

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: None) -> tuple[Tensor, Tensor]:
        """One step of the cell."""
        state = self.cell(state, token, depth)
        return state, self.output_norm(state)
