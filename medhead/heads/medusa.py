"""Medusa heads (Cai et al. 2024): independent residual blocks on the last hidden state, one head for each depth."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.base import Heads, HeadsConfig, register_kind


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b) with W and b zero at the start, so that an untrained head repeats the target's own guess."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        return x + F.silu(self.linear(x))


@register_kind("medusa")
class MedusaHeads(Heads):
    """The state is the target's hidden state; no head sees a token of the path."""

    per_path = False

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.blocks)))
            for _ in range(config.depth)
        )

    def start(self, hidden: Tensor) -> Tensor:
        """The hidden state itself."""
        return hidden

    def advance(self, state: Tensor, token: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Head `depth` reads the unchanged state; the token is not looked at."""
        return state, self.heads[depth](state)
