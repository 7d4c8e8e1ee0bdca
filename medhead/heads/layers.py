"""Layers that several kinds of heads share: linear and decoder layers, rotary positions, a gated cell, a correction."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medhead.heads.config import HeadsConfig
from medhead_kernels.packed_linear import PackedLinear


class Linear(nn.Linear):
    """PyTorch's linear layer, which multiplies by a packed copy of its weights while decoding on a CPU."""

    packed: PackedLinear | None = None  # used while decoding (`OutputHead.pack` sets it); None in training

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if self.packed is not None and self.packed.weight.data_ptr() == self.weight.data_ptr():
            return self.packed(x)
        return F.linear(x, self.weight, self.bias)  # in training, or with weights assigned since


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm in the dtype of its input: autocast on CUDA makes norms float32, and so all that reads them."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to the same shape."""
        return super().forward(x).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021), with tables that grow with the largest position.

    `scaling` is a `rope_scaling` entry of a transformers configuration (linear, llama3, yarn, ...), which refers to a
    `max_position_embeddings` of `context`.
    """

    def __init__(self, dim: int, theta: float, scaling: dict[str, Any] | None = None, context: int = 0) -> None:
        super().__init__()
        self.dim, self.theta, self.scaling, self.context = dim, theta, scaling, context
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, positions: Tensor, max_len: int) -> Tensor:
        """Rotate `[..., heads, dim]` by the angles of `positions` `[...]`, all of them below `max_len`."""
        cos, sin = self._table(x.device, x.dtype, max_len)
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _table(self, device: torch.device, dtype: torch.dtype, max_len: int) -> tuple[Tensor, Tensor]:
        known = self._tables.get((device, dtype))
        if known is None or known[0].shape[0] < max_len:
            with torch.inference_mode(False), torch.no_grad():
                rows = max(256, 1 << (max_len - 1).bit_length())
                frequencies, factor = self._frequencies()
                angles = torch.arange(rows, dtype=torch.float32)[:, None] * frequencies
                cos, sin = ((f(angles) * factor).to(device, dtype) for f in (torch.cos, torch.sin))
            known = self._tables[device, dtype] = cos, sin
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
    """Return the projection of several layers' outputs to one feature; before training it copies the last layer's output."""
    projection = Linear(features, size, bias=False)
    with torch.no_grad():
        projection.weight.zero_()
        projection.weight[:, -size:] = torch.eye(size)
    return projection


class GatedMLP(nn.Module):
    """Llama's feed-forward layer, W_d (SiLU(W_g x) * W_u x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=False)
        self.up_proj = Linear(size, inner, bias=False)
        self.down_proj = Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., size]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Projections(nn.Module):
    """The four projections of an attention layer whose input has `in_size` numbers and whose output `out_size`."""

    def __init__(self, config: HeadsConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        self.dim = config.head_dim
        self.q_proj = Linear(in_size, config.num_heads * self.dim, bias=False)
        self.k_proj = Linear(in_size, config.num_kv_heads * self.dim, bias=False)
        self.v_proj = Linear(in_size, config.num_kv_heads * self.dim, bias=False)
        self.o_proj = Linear(config.num_heads * self.dim, out_size, bias=False)


class DecoderLayer(nn.Module):
    """Llama's decoder layer around a given attention; before training it adds nothing to the residual stream."""

    def __init__(self, config: HeadsConfig, attention: Projections, size: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.mlp = GatedMLP(size, config.inner_size)
        nn.init.zeros_(attention.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)

    def forward(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output `[..., size]` from the residual stream and the attention's values `[..., heads * dim]`."""
        x = residual + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class GatedCell(nn.Module):
    """A recurrent cell: state + W_o (SiLU(W_g z) * W_u z), z = [norm(state); norm(embedding)], with a bias per depth.

    The products with state and embedding are computed apart, because the second depends on the token alone.
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
        """Return the token's part of the gates, `[..., 2 * inner]`."""
        return self.of_token(self.embedding_norm(embedding))

    def forward(self, state: Tensor, token: Tensor, depth: int) -> Tensor:
        """Return the next state, from the last one and the result of `encode` for the token."""
        gate, up = (self.of_state(self.state_norm(state)) + (token + self.depth_bias[depth])).chunk(2, dim=-1)
        return state + self.outer(F.silu(gate) * up)


class ParentCorrection(nn.Module):
    """A function of the parent token that is added to a parallel head's hidden state, so that siblings' children differ."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, bias=False)
        self.inner = Linear(size, inner, bias=False)
        self.outer = Linear(inner, size, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map the embedding `[..., size]` to the same shape."""
        return self.outer(F.silu(self.inner(self.norm(embedding))))
