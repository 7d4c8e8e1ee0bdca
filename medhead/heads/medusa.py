"""Medusa heads (Cai et al. 2024): residual blocks on the last hidden state, one head for each depth.

With `correction="parent"` a feature of the parent's token is added, so that the children of siblings differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.base import Draft, Heads, HeadsConfig, register_kind
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import Linear, ParentCorrection


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b) with W and b zero at the start, so that an untrained head repeats the target's own guess."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        return x + F.silu(self.linear(x))


@register_kind("medusa")
class MedusaHeads(Heads):
    """Nothing is carried along a path: the target's hidden state is shared by all nodes of a proposal."""

    corrections = ("none", "parent")

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.blocks)))
            for _ in range(config.depth)
        )
        matrices = (1 if config.tied else config.depth) if config.own_output else 0
        rows = config.draft_vocab or config.vocab_size
        self.output_matrices = nn.ParameterList(torch.empty(rows, config.hidden_size) for _ in range(matrices))
        for matrix in self.output_matrices:
            nn.init.normal_(matrix, std=config.hidden_size**-0.5)
        self.per_path = config.correction == "parent"
        self.correction = ParentCorrection(config.hidden_size, config.inner_size) if self.per_path else None

    def own_output(self, depth: int) -> Tensor | None:
        """A loaded checkpoint's output matrix of this depth, or of all."""
        if not self.config.own_output:
            return None
        return self.output_matrices[0 if self.config.tied else depth]

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """The hidden state itself, shared."""
        return Draft(features[..., :0], features)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """The parent's correction."""
        return embedding if self.correction is None else self.correction(embedding)

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Head `depth` reads the shared state; of the path only the last token may matter."""
        feature = self.heads[depth](shared)
        return state, feature if self.correction is None else feature + token
