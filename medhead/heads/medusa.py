"""Medusa heads (Cai et al. 2024): residual blocks on the last hidden state, one head for each depth.

With `correction="parent"` a function of the parent token is added, so that the children of siblings differ.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.base import Heads, HeadsConfig, register_kind
from medhead.heads.layers import Linear, ParentCorrection


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b), with W and b zero at the start: an untrained head repeats the target's own distribution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to the same shape."""
        return x + F.silu(self.linear(x))


@register_kind("medusa")
class MedusaHeads(Heads):
    """The state is empty: all nodes of a proposal share the target's hidden state."""

    corrections = ("none", "parent")

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.num_layers)))
            for _ in range(config.depth)
        )
        self.add_own_matrices(1 if config.tie_weights else config.depth, config.hidden_size)
        self.path_dependent = config.correction == "parent"
        self.correction = ParentCorrection(config.hidden_size, config.inner_size) if self.path_dependent else None

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Share the hidden state."""
        return features[..., :0], features

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return the parent token's correction, if there is one."""
        return embedding if self.correction is None else self.correction(embedding)

    def step(self, state: Tensor, token: Tensor, depth: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Run head `depth` on the shared hidden state and add the correction."""
        hidden = self.heads[depth](context)
        return state, hidden if self.correction is None else hidden + token
