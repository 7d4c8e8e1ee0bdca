"""Sequential heads with weights of their own for every depth (Hydra, Ankner et al. 2024), in the form of `mlp_speculator`.

At depth i, with the token on the path: state <- GELU(LN_i(P_i state + s * E_i(token))), logits_i = H_i(state), where
s = emb_weight / state_weight (Wertheimer et al. 2024, arXiv 2404.19124). Trained here, E_i and H_i are small projections
from the target's embedding and into its frozen output matrix; a loaded checkpoint brings its own `[vocab, inner]`
matrices instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.base import Draft, Heads, HeadsConfig, register_kind
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import Linear


class SpeculatorNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps), with weight and bias if it is affine."""

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


@register_kind("sequential")
class SequentialHeads(Heads):
    """The state has `inner_size` numbers; every depth has its own weights unless `tied`."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        size, inner = config.hidden_size, config.inner_size
        depths = 1 if config.tied else config.depth
        state_weight = 0.5 ** (0.5 / config.depth)
        self.token_scale = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
        self.first = Linear(size, inner, bias=False)
        self.proj = nn.ModuleList(
            Linear(inner, inner, bias=False) for _ in range(1 if config.tied else config.depth - 1)
        )
        self.norms = nn.ModuleList(SpeculatorNorm(inner) for _ in range(depths))
        self.input_norm = SpeculatorNorm(size, affine=False) if config.scale_input else None
        own = config.own_embedding, config.own_output
        self.encoders = None if own[0] else nn.ModuleList(Linear(size, inner, bias=False) for _ in range(depths))
        self.outputs = None if own[1] else nn.ModuleList(Linear(inner, size, bias=False) for _ in range(depths))
        self.embeddings = nn.ParameterList(
            torch.empty(config.vocab_size, inner) for _ in range(depths if own[0] else 0)
        )
        rows = config.draft_vocab or config.vocab_size
        self.output_matrices = nn.ParameterList(torch.empty(rows, inner) for _ in range(depths if own[1] else 0))
        for matrix in (*self.embeddings, *self.output_matrices):
            nn.init.normal_(matrix, std=inner**-0.5)
        self.encodes_by_depth = depths > 1

    def own_embedding(self, depth: int) -> Tensor | None:
        """A loaded checkpoint's embedding of this depth."""
        return self.embeddings[self._at(depth)] if self.config.own_embedding else None

    def own_output(self, depth: int) -> Tensor | None:
        """A loaded checkpoint's output matrix of this depth."""
        return self.output_matrices[self._at(depth)] if self.config.own_output else None

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """The hidden state itself, scaled if the configuration says so."""
        return Draft(features if self.input_norm is None else self.input_norm(features) / math.sqrt(2), None)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """The token's part, `[..., inner]`."""
        part = embedding if self.encoders is None else self.encoders[self._at(depth)](embedding)
        return part * self.token_scale

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: None) -> tuple[Tensor, Tensor]:
        """One depth."""
        project, _, norm, output = self.level(depth)
        state = F.gelu(norm(project(state) + token))
        return state, state if output is None else output(state)

    def level(self, depth: int) -> tuple[Any, Any, Any, Any]:
        """Layers of a depth: of the state, of the token (None if it is used as it is), the norm, and of the output (or None)."""
        at = self._at(depth)
        project = self.first if depth == 0 else self.proj[0 if self.config.tied else depth - 1]
        encode, output = (None if layers is None else layers[at] for layers in (self.encoders, self.outputs))
        return project, encode, self.norms[at], output

    def _at(self, depth: int) -> int:
        return 0 if self.config.tied else depth
