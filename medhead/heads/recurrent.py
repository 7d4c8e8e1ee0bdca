"""Recurrent heads: one small gated cell, shared by all depths, carries a state along each path.

They belong to the family of ReDrafter (Cheng et al. 2024) and Hydra (Ankner et al. 2024): a node's distribution depends on
its parent token, the largest single factor in the accuracy of draft tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medhead.heads.base import Heads, HeadsConfig, register_kind
from medhead.heads.layers import GatedCell


@register_kind("recurrent")
class RecurrentHeads(Heads):
    """The state starts as the target's hidden state; the cell updates it with every token of the path."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.cell = GatedCell(config.hidden_size, config.inner_size, config.depth)
        self.output_norm = nn.LayerNorm(config.hidden_size, bias=False)

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Return the hidden state itself."""
        return features, None

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return the token's part of the gates."""
        return self.cell.encode(embedding)

    def step(self, state: Tensor, token: Tensor, depth: int, context: None) -> tuple[Tensor, Tensor]:
        """Run the cell once."""
        state = self.cell(state, token, depth)
        return state, self.output_norm(state)
