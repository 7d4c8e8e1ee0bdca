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

from medhead.heads.base import Heads, HeadsConfig, register_kind
from medhead.heads.layers import Linear


class SpeculatorNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps), with weight and bias if it is affine."""

    def __init__(self, size: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to the same shape."""
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


@register_kind("sequential")
class SequentialHeads(Heads):
    """The state has `inner_size` numbers; every depth has its own weights unless `tie_weights`."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        size, inner = config.hidden_size, config.inner_size
        depths, projections = (1, 1) if config.tie_weights else (config.depth, config.depth - 1)
        state_weight = 0.5 ** (0.5 / config.depth)
        self.token_scale = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight
        self.first = Linear(size, inner, bias=False)
        self.proj = nn.ModuleList(Linear(inner, inner, bias=False) for _ in range(projections))
        self.norms = nn.ModuleList(SpeculatorNorm(inner) for _ in range(depths))
        self.input_norm = SpeculatorNorm(size, affine=False) if config.scale_input else None
        encoders = (Linear(size, inner, bias=False) for _ in range(depths))
        outputs = (Linear(inner, size, bias=False) for _ in range(depths))
        self.encoders = None if config.own_embedding else nn.ModuleList(encoders)
        self.outputs = None if config.own_output else nn.ModuleList(outputs)
        self.add_own_matrices(depths, inner)
        self.encode_uses_depth = depths > 1

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Return the hidden state, normalised and scaled if `scale_input`."""
        return features if self.input_norm is None else self.input_norm(features) / math.sqrt(2), None

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return the token's part, `[..., inner]`."""
        part = embedding if self.encoders is None else self.encoders[self._index(depth)](embedding)
        return part * self.token_scale

    def step(self, state: Tensor, token: Tensor, depth: int, context: None) -> tuple[Tensor, Tensor]:
        """Run the layers of one depth."""
        index = self._index(depth)
        project = self.first if depth == 0 else self.proj[0 if self.config.tie_weights else depth - 1]
        state = F.gelu(self.norms[index](project(state) + token))
        return state, state if self.outputs is None else self.outputs[index](state)

    def _index(self, depth: int) -> int:
        return 0 if self.config.tie_weights else depth
