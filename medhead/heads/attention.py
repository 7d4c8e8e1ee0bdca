"""Attention heads: one decoder layer, autoregressive over depth, on fused features of the target (EAGLE-3, Li et al. 2025).

The layer's input is [norm(embedding of the next token); norm(feature)], its residual stream is the feature, and its output
is the feature of the next depth. It attends to the whole text (`DraftCacheView`) and to its own path, whose keys and values
are part of a node's state, so that every node of a frontier sees exactly its ancestors. Module names are those of the
hub's EAGLE-3 checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medhead.errors import MedheadError
from medhead.heads.attention_layers import attend
from medhead.heads.base import HeadsConfig, register_kind
from medhead.heads.cached import CachedHeads, join_kv
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import DecoderLayer, Projections, RMSNorm


class JointAttention(Projections):
    """Projections of [embedding; feature]; the two halves of the product are computed apart, see `AttentionHeads.encode`."""

    def __init__(self, config: HeadsConfig, size: int) -> None:
        super().__init__(config, 2 * size, size)
        # Queries start as the keys of their own token, here and at its earlier occurrences. Under uniform attention the token
        # itself, the most important input, is one among hundreds of keys, and short training rarely learns to attend to it.
        scale = (8.0 / (size * self.dim**0.5)) ** 0.5  # a token's score with itself is about 8
        same = torch.randn(config.num_kv_heads, self.dim, size) * scale
        with torch.no_grad():
            self.k_proj.weight[:, :size] = same.flatten(0, 1)
            repeated = same.repeat_interleave(config.num_heads // config.num_kv_heads, 0)
            self.q_proj.weight[:, :size] = repeated.flatten(0, 1)

    def project_half(self, x: Tensor, second: bool) -> Tensor:
        """Return queries, keys and values of one half of the input, `[..., (num_heads + 2 * num_kv_heads) * dim]`."""
        size = x.shape[-1]
        columns = slice(size, None) if second else slice(0, size)
        weight = torch.cat([proj.weight[:, columns] for proj in (self.q_proj, self.k_proj, self.v_proj)])
        return nn.functional.linear(x, weight)


class MidLayer(DecoderLayer):
    """The decoder layer, with a norm of the feature."""

    self_attn: JointAttention

    def __init__(self, config: HeadsConfig, size: int) -> None:
        super().__init__(config, JointAttention(config, size), size)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)


@register_kind("attention")
class AttentionHeads(CachedHeads):
    """The state is the feature, followed by keys and values of the path below the root."""

    def __init__(self, config: HeadsConfig) -> None:
        size = config.draft_hidden_size or config.hidden_size
        if size != config.hidden_size and not (config.own_embedding and config.own_output):
            raise MedheadError(
                f"attention heads with draft_hidden_size {size} for a target of hidden size {config.hidden_size} need an "
                "embedding and an output matrix of their own (own_embedding, own_output)"
            )
        super().__init__(config, size, num_layers=1)
        self.size = size
        self.midlayer = MidLayer(config, size)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.add_own_matrices(1, size)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return the token's part of queries, keys and values."""
        return self.midlayer.self_attn.project_half(self.midlayer.input_layernorm(embedding), second=False)

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, max_len: int) -> Tensor:
        """Return keys and values of committed tokens: each from its feature and the token after it."""
        _, key, value = self._project(self.midlayer.hidden_norm(self.fc(features)), token)
        return join_kv([(self.rotary(key, positions, max_len), value)])

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Return the fused feature of the token before the root, whose keys and values are the last cache entry."""
        return self.fc(features), cache

    def step(self, state: Tensor, token: Tensor, depth: int, context: DraftCacheView) -> tuple[Tensor, Tensor]:
        """Run the layer over nodes of one depth."""
        feature, path = state[..., : self.size], state[..., self.size :]
        normed = self.midlayer.hidden_norm(feature)
        query, key, value = self._project(normed, token)
        positions, max_len = context.end - 1 + depth, context.rows.shape[1] + depth
        query = self.rotary(query, positions, max_len)
        path_kv = None
        if depth:  # the root's own keys and values are the last cache entry
            path = torch.cat([path, join_kv([(self.rotary(key, positions, max_len), value)])], -1)
            path_kv = self.split_kv(path.unflatten(-1, (depth, -1)))[0]
        text_kv = self.split_kv(context.rows)[0]
        attended = attend(query[:, :, None], text_kv, context.visible(), path_kv)[:, :, 0]
        feature = self.midlayer(normed if self.config.norm_before_residual else feature, attended)
        return torch.cat([feature, path], -1), self.norm(feature)

    def _project(self, normed: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values `[..., heads, dim]` of the normed feature and the result of `encode`."""
        joint = token + self.midlayer.self_attn.project_half(normed, second=True)
        heads = joint.unflatten(-1, (-1, self.dim))
        return heads.split([self.config.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
