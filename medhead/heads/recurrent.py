"""One small recurrent cell, shared by all depths, that carries a state along each path and sees the parent's token.

In the family of ReDrafter (Cheng et al. 2024) and Hydra (Ankner et al. 2024): a node knows its parent token, which is
the largest single factor in how many guesses are right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.base import Heads, HeadsConfig, register_kind


@register_kind("recurrent")
class RecurrentHeads(Heads):
    """A gated residual cell: state + W_o (SiLU(W_g z) * W_u z) with z = [norm(state); norm(embedding)] and a bias per depth.

    The products with the state and with the embedding are kept apart, because the second depends on the token alone.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        size, inner = config.hidden_size, config.inner_size
        self.embedding_norm = nn.LayerNorm(size, bias=False)
        self.state_norm = nn.LayerNorm(size, bias=False)
        self.output_norm = nn.LayerNorm(size, bias=False)
        self.of_state = nn.Linear(size, 2 * inner, bias=False)
        self.of_token = nn.Linear(size, 2 * inner, bias=False)
        self.outer = nn.Linear(inner, size, bias=False)
        self.depth_bias = nn.Parameter(torch.zeros(config.depth, 2 * inner))
        nn.init.zeros_(self.outer.weight)

    def start(self, hidden: Tensor) -> Tensor:
        """The hidden state itself."""
        return hidden

    def encode(self, embedding: Tensor) -> Tensor:
        """The token's part of the gates, `[..., 2 * inner]`."""
        return self.of_token(self.embedding_norm(embedding))

    def advance(self, state: Tensor, token: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """One step of the cell."""
        gate, up = (self.of_state(self.state_norm(state)) + (token + self.depth_bias[depth])).chunk(2, dim=-1)
        state = state + self.outer(F.silu(gate) * up)
        return state, self.output_norm(state)
