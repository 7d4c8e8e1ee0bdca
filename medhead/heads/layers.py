"""Parts that several kinds of heads share: rotary positions, a gated cell, corrections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead_kernels import skinny_gemm as skinny_gemm


class Linear(nn.Linear):
    """PyTorch's layer, fast for the few rows of a frontier too.

    Attributes:
        matrix: what it multiplies by while decoding (`OutputHead` sets it); None in training.
    """

    matrix: skinny_gemm.PackedLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.matrix is not None and self.matrix.weight.data_ptr() == self.weight.data_ptr():
            return self.matrix(x)
        return skinny_gemm.linear(x, self.weight, self.bias)  # in training, or it was given other weights since


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021); tables are made once and grow with the positions that are asked for.

    Args:
        dim: size of a head.
        theta: base of the frequencies.
        scaling: a `rope_scaling` entry of a transformers configuration (linear, llama3, yarn, ...), or None.
        context: the context that `scaling` speaks of.
    """

    def __init__(self, dim: int, theta: float, scaling: dict[str, Any] | None = None, context: int = 0) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta
        self.scaling, self.context = scaling, context
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Turn `[..., heads, dim]` by the angles of `positions` `[...]`, all of them below `longest`."""
        cos, sin = self._table(x.device, x.dtype, longest)
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _table(self, device: torch.device, dtype: torch.dtype, longest: int) -> tuple[Tensor, Tensor]:
        known = self._tables.get((device, dtype))
        if known is None or known[0].shape[0] < longest:
            with torch.inference_mode(False), torch.no_grad():
                rows = max(256, 1 << (longest - 1).bit_length())
                frequencies, factor = self._frequencies()
                angles = torch.arange(rows, dtype=torch.float32)[:, None] * frequencies
                known = tuple((f(angles) * factor).to(device, dtype) for f in (torch.cos, torch.sin))  # type: ignore[assignment]
            self._tables[device, dtype] = known  # type: ignore[assignment]
        assert known is not None
        return known

    def _frequencies(self) -> tuple[Tensor, float]:
        scaling = self.scaling or {}
        theta = scaling.get("rope_theta", self.theta)
        if not scaling or (scaling.get("rope_type") or scaling.get("type")) == "default":
            return theta ** -(torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim), 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        parameters = {**scaling, "rope_theta": theta}
        parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type")
        config = LlamaConfig(
            head_dim=self.dim, max_position_embeddings=self.context or 2048, rope_parameters=parameters
        )
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")


def fuse_layers(features: int, size: int) -> Linear:
    """The projection of several layers' outputs to one feature; it starts by handing on the last of them alone."""
    projection = Linear(features, size, bias=False)
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[:, -size:] = torch.eye(size)
    return projection


class GatedMLP(nn.Module):
    """SiLU(W_g x) * W_u x, projected back (Llama's feed-forward)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=False)
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PathCell(nn.Module):
    """One step along a path: state + W_o (SiLU(W_g z) * W_u z), z = [norm(state); norm(embedding)], a bias per depth.

    The products with the state and with the embedding are kept apart, because the second depends on the token alone.

    Args:
        size: of the state.
        inner: width of the gates.
        depth: number of steps that have a bias of their own.
    """

    def __init__(self, size: int, inner: int, depth: int) -> None:
        super().__init__()
        self.embedding_norm = nn.LayerNorm(size, bias=False)
        self.state_norm = nn.LayerNorm(size, bias=False)
        self.of_state = Linear(size, 2 * inner, bias=False)
        self.of_token = Linear(size, 2 * inner, bias=False)
        self.outer = Linear(inner, size, bias=False)
        self.depth_bias = nn.Parameter(torch.zeros(depth, 2 * inner))
        nn.init.zeros_(self.outer.weight)

    def encode(self, embedding: Tensor) -> Tensor:
        """The token's part of the gates, `[..., 2 * inner]`."""
        return self.of_token(self.embedding_norm(embedding))

    def forward(self, state: Tensor, token: Tensor, depth: int) -> Tensor:
        """The next state, from the last one and what `encode` made of the token."""
        gate, up = (self.of_state(self.state_norm(state)) + (token + self.depth_bias[depth])).chunk(2, dim=-1)
        return state + self.outer(F.silu(gate) * up)


class ParentCorrection(nn.Module):
    """A feature that depends on the parent token alone (ALGORITHMS: a sibling's children must not be its own).

    Added to what a parallel head says, before the shared output matrix: `s_d + M(e_u)`.
    """

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, bias=False)
        self.inner = Linear(size, inner, bias=False)
        self.outer = Linear(inner, size, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """`[..., size]` of the embedding to the same shape."""
        return self.outer(F.silu(self.inner(self.norm(embedding))))


def split_rows(rows: Tensor, layers: int, key_heads: int, dim: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[..., length, key_heads, dim]` of every layer from memory rows `[..., length, size]`."""
    parts = rows.unflatten(-1, (layers, 2, key_heads, dim))
    return [(parts[..., layer, 0, :, :], parts[..., layer, 1, :, :]) for layer in range(layers)]
