"""A parallel block head (DFlash, JetSpec, DSpark 2026): one pass of a few small layers says something for every depth.

The block is [root, mask, mask, ...]; slot d speaks for the children of depth-d nodes. Queries come from the block, keys
and values from the block and from the target's features of every committed token, which each layer projects for itself
(`DraftCacheView`). What a slot says is the same for all nodes of its depth, so a correction that sees the path is added: of the
parent token, or of the whole path by a small recurrent cell (as Domino does). Proposing costs one pass whatever the
depth, and one small product a depth.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from medhead.heads.attention_layers import attend
from medhead.heads.base import Draft, Heads, HeadsConfig, register_kind
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import GatedMLP, Linear, ParentCorrection, PathCell, Rotary, fuse_layers, split_rows


class BlockAttention(nn.Module):
    """Projections of one layer, with norms of queries and keys."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(size, config.num_heads * dim, bias=False)
        self.k_proj = Linear(size, config.key_heads * dim, bias=False)
        self.v_proj = Linear(size, config.key_heads * dim, bias=False)
        self.o_proj = Linear(config.num_heads * dim, size, bias=False)
        self.q_norm = nn.RMSNorm(dim, config.norm_eps)
        self.k_norm = nn.RMSNorm(dim, config.norm_eps)
        self.dim = dim
        nn.init.zeros_(self.o_proj.weight)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed, not yet turned) and values `[..., key_heads, dim]`."""
        key, value = self.k_proj(x), self.v_proj(x)
        return self.k_norm(key.unflatten(-1, (-1, self.dim))), value.unflatten(-1, (-1, self.dim))

    def queries(self, x: Tensor) -> Tensor:
        """Queries `[..., heads, dim]`."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.dim)))


class BlockLayer(nn.Module):
    """One decoder layer of the block."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = GatedMLP(size, config.inner_size)
        nn.init.zeros_(self.mlp.down_proj.weight)


@register_kind("block")
class BlockHeads(Heads):
    """Slots are shared by all nodes of a proposal; a state along the path exists only with the recurrent correction."""

    corrections = ("none", "parent", "recurrent")
    fuses = True

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        config.check_attention()
        size = config.hidden_size
        self.key_heads, self.dim = config.key_heads, config.head_dim
        self.fc = fuse_layers(self.feature_size, size)
        self.hidden_norm = nn.RMSNorm(size, config.norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(size, config.norm_eps)
        self.first = 0 if config.anchor_predicts else 1  # the slot that speaks for the root's children
        self.slots = config.depth + self.first
        learnt = config.mask_token < 0  # a vector for every slot, the first one added to the root
        self.mask_embedding = nn.Parameter(torch.randn(self.slots, size) * size**-0.5) if learnt else None
        self.mask_row: Tensor | None
        self.register_buffer("mask_row", None if learnt else torch.zeros(size))
        self.rotary = Rotary(self.dim, config.rope_theta, config.rope_scaling, config.context)
        self.memory_size = config.blocks * 2 * self.key_heads * self.dim
        self.per_path = config.correction != "none"
        self.parent = ParentCorrection(size, config.correction_size) if config.correction == "parent" else None
        self.cell = PathCell(size, config.correction_size, config.depth) if config.correction == "recurrent" else None
        hidden = torch.ones(self.slots, self.slots, dtype=torch.bool, device="cpu").triu(1)
        self.register_buffer("_later", hidden, persistent=False)

    def set_mask(self, row: Tensor) -> None:
        """Give heads with a `mask_token` the target's embedding of that token, `[hidden]`."""
        assert self.mask_row is not None
        self.mask_row.copy_(row)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """The embedding, and the token's part of the correction behind it."""
        if self.cell is not None:
            return torch.cat([embedding, self.cell.encode(embedding)], -1)
        if self.parent is not None:
            return torch.cat([embedding, self.parent(embedding)], -1)
        return embedding

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Keys and values of the fused feature in every layer; the token behind it does not matter."""
        context, parts = self.hidden_norm(self.fc(features)), []
        layer: Any
        for layer in self.layers:
            key, value = layer.self_attn.keys_values(context)
            parts += [self.rotary(key, positions, longest).flatten(-2), value.flatten(-2)]
        return torch.cat(parts, -1)

    def start(self, features: Tensor, root: Tensor, memory: DraftCacheView | None, depth: int | None = None) -> Draft:
        """The pass over the block: `root` is what `encode` made of the root's token, `[batch, anchors, ...]`."""
        assert memory is not None
        size = self.config.hidden_size
        slots = self._pass(root[..., :size], memory, depth)
        state = self.hidden_norm(self.fc(features)) if self.cell is not None else features[..., :0]
        return Draft(state, slots)

    def advance(self, state: Tensor, token: Tensor, depth: int, shared: Tensor) -> tuple[Tensor, Tensor]:
        """What the depth's slot says, corrected by the path."""
        slot, code = shared[..., self.first + depth, :], token[..., self.config.hidden_size :]
        if self.cell is not None:
            state = self.cell(state, code, depth)
            return state, self.norm(slot + state)
        feature = self.norm(slot)
        return state, feature if self.parent is None else feature + code

    def _pass(self, root: Tensor, memory: DraftCacheView, depth: int | None) -> Tensor:
        """`[batch, anchors, hidden]` to slots `[batch, anchors, slots, hidden]`."""
        batch, anchors, _ = root.shape
        count = self.slots
        if depth is not None and self.config.causal:  # later slots change nothing
            count = depth + self.first
        if self.mask_embedding is not None:
            root, masks = root + self.mask_embedding[0], self.mask_embedding[1:count]
        else:
            assert self.mask_row is not None
            masks = self.mask_row.expand(count - 1, -1)
        x = torch.cat([root[:, :, None], masks.to(root.dtype).expand(batch, anchors, -1, -1)], 2)
        positions = memory.end[..., None] + torch.arange(count, device=root.device)
        longest, seen = memory.rows.shape[1] + count, memory.visible()
        later = cast(Tensor, self._later)[:count, :count] if self.config.causal else None
        of_layers = split_rows(memory.rows, len(self.layers), self.key_heads, self.dim)
        layer: Any
        for layer, keys_values in zip(self.layers, of_layers, strict=True):
            normed = layer.input_layernorm(x)
            key, value = layer.self_attn.keys_values(normed)
            own = self.rotary(key, positions, longest), value
            query = self.rotary(layer.self_attn.queries(normed), positions, longest)
            x = x + layer.self_attn.o_proj(attend(query, keys_values, seen, own, later))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x
