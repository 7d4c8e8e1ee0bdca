"""One decoder layer, autoregressive over depth, on features fused from several layers of the target (EAGLE-3, Li et al. 2025).

The layer's input is [norm(embedding of the next token); norm(feature)], its residual stream is the feature, and what
comes out is the feature of the next depth. It looks back on the whole text (`DraftCacheView`) and on its own path, whose keys
and values are part of a node's state, so that every node of a frontier sees exactly its ancestors. Module names are
those of the hub's EAGLE-3 checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medhead.errors import MedheadError
from medhead.heads.attention_layers import attend
from medhead.heads.base import Draft, Heads, HeadsConfig, register_kind
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import GatedMLP, Linear, Rotary, fuse_layers, split_rows


class JointAttention(nn.Module):
    """Projections of [embedding; feature]; the two halves of the product are taken apart, see `AttentionHeads.encode`."""

    def __init__(self, config: HeadsConfig, size: int) -> None:
        super().__init__()
        heads, dim = config.num_heads, config.head_dim
        self.q_proj = Linear(2 * size, heads * dim, bias=False)
        self.k_proj = Linear(2 * size, config.key_heads * dim, bias=False)
        self.v_proj = Linear(2 * size, config.key_heads * dim, bias=False)
        self.o_proj = Linear(heads * dim, size, bias=False)
        self._look_at_the_same_token(size, dim, config.key_heads)

    @torch.no_grad()
    def _look_at_the_same_token(self, size: int, dim: int, key_heads: int) -> None:
        """Begin with queries that match the keys of their own token, here and wherever it stood before.

        From an even attention the token itself, the most important input, is one among hundreds of keys, and short
        training runs hardly find it.
        """
        scale = (8.0 / (size * dim**0.5)) ** 0.5  # so that a token's score with itself is about 8
        same = torch.randn(key_heads, dim, size) * scale
        self.k_proj.weight[:, :size] = same.flatten(0, 1)
        repeat = self.q_proj.weight.shape[0] // (dim * key_heads)
        self.q_proj.weight[:, :size] = same.repeat_interleave(repeat, 0).flatten(0, 1)

    def of_half(self, x: Tensor, second: bool) -> Tensor:
        """Queries, keys and values of one half of the input, `[..., (heads + 2 * key_heads) * dim]`."""
        size = x.shape[-1]
        columns = slice(size, None) if second else slice(0, size)
        weight = torch.cat([proj.weight[:, columns] for proj in (self.q_proj, self.k_proj, self.v_proj)])
        return nn.functional.linear(x, weight)


class MidLayer(nn.Module):
    """The decoder layer."""

    def __init__(self, config: HeadsConfig, size: int) -> None:
        super().__init__()
        eps = config.norm_eps
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = JointAttention(config, size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = GatedMLP(size, config.inner_size)


@register_kind("attention")
class AttentionHeads(Heads):
    """The state is the feature, followed by keys and values of the path below the root."""

    fuses = True

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        config.check_attention()
        self.heads, self.key_heads, self.dim = config.num_heads, config.key_heads, config.head_dim
        self.size = config.layer_size or config.hidden_size
        if self.size != config.hidden_size and not (config.own_embedding and config.own_output):
            raise MedheadError(
                f"an attention layer of width {self.size} for a target of hidden size {config.hidden_size} needs an "
                "embedding and an output matrix of its own"
            )
        self.fc = fuse_layers(self.feature_size, self.size)
        self.midlayer = MidLayer(config, self.size)
        self.norm = nn.RMSNorm(self.size, config.norm_eps)
        self.rotary = Rotary(self.dim, config.rope_theta, config.rope_scaling, config.context)
        self.memory_size = 2 * self.key_heads * self.dim
        rows = config.draft_vocab or config.vocab_size
        self.lm_head = nn.Parameter(torch.empty(rows, self.size)) if config.own_output else None
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, self.size)) if config.own_embedding else None
        for matrix in (self.lm_head, self.embed_tokens):
            if matrix is not None:
                nn.init.normal_(matrix, std=self.size**-0.5)
        nn.init.zeros_(self.midlayer.self_attn.o_proj.weight)
        nn.init.zeros_(self.midlayer.mlp.down_proj.weight)

    def own_embedding(self, depth: int) -> Tensor | None:
        """A loaded checkpoint's embedding."""
        return self.embed_tokens

    def own_output(self, depth: int) -> Tensor | None:
        """A loaded checkpoint's output matrix."""
        return self.lm_head

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """The token's part of queries, keys and values."""
        return self.midlayer.self_attn.of_half(self.midlayer.input_layernorm(embedding), second=False)

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Keys and values of a committed token: of its feature and of the token behind it."""
        _, key, value = self._project(self.midlayer.hidden_norm(self.fc(features)), token)
        key = self.rotary(key, positions, longest)
        return torch.cat([key.flatten(-2), value.flatten(-2)], -1)

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """The fused feature of the token before the root, whose keys and values the memory ends with."""
        assert memory is not None
        return Draft(self.fc(features), memory)

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: DraftCacheView) -> tuple[Tensor, Tensor]:
        """One pass of the layer over nodes of one depth."""
        layer = self.midlayer
        feature, path = state[..., : self.size], state[..., self.size :]
        normed = layer.hidden_norm(feature)
        query, key, value = self._project(normed, token)
        at, longest = shared.end - 1 + depth, shared.rows.shape[1] + depth
        query = self.rotary(query, at, longest)
        own = None
        if depth:  # the root's own keys and values are the memory's last row
            key = self.rotary(key, at, longest)
            path = torch.cat([path, key.flatten(-2), value.flatten(-2)], -1)
            parts = path.unflatten(-1, (depth, 2, self.key_heads, self.dim))
            own = parts[..., 0, :, :], parts[..., 1, :, :]
        memory = split_rows(shared.rows, 1, self.key_heads, self.dim)[0]
        found = attend(query[:, :, None], memory, shared.visible(), own)[:, :, 0]
        feature = (normed if self.config.norm_before_residual else feature) + layer.self_attn.o_proj(found)
        feature = feature + layer.mlp(layer.post_attention_layernorm(feature))
        return torch.cat([feature, path], -1), self.norm(feature)

    def _project(self, normed: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[..., heads, dim]`, from the normed feature and what `encode` made of the token."""
        joint = token + self.midlayer.self_attn.of_half(normed, second=True)
        heads = joint.unflatten(-1, (-1, self.dim))
        query, key, value = heads.split([self.heads, self.key_heads, self.key_heads], -2)
        return query, key, value
