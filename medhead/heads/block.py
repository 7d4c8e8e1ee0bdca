"""Block heads (DFlash, JetSpec, DSpark 2026): one pass of a few small layers predicts all depths in parallel.

The block is [root, mask, mask, ...]; slot d predicts the children of depth-d nodes. Queries come from the block, keys and
values from the block and from the target's features of every committed token, which each layer projects for itself
(`DraftCacheView`). A slot's output is the same for all nodes of its depth, so a correction that depends on the path is
added: a function of the parent token, or a small recurrent cell over the whole path (as in Domino). A proposal costs one
pass whatever the depth, and one small product per depth.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from medhead.heads.attention_layers import attend
from medhead.heads.base import HeadsConfig, register_kind
from medhead.heads.cached import CachedHeads, join_kv
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.layers import DecoderLayer, GatedCell, ParentCorrection, Projections, RMSNorm


class BlockAttention(Projections):
    """Projections of one layer, with norms of queries and keys."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config, config.hidden_size, config.hidden_size)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys (normed, not yet rotated) and values `[..., num_kv_heads, dim]`."""
        key, value = self.k_proj(x), self.v_proj(x)
        return self.k_norm(key.unflatten(-1, (-1, self.dim))), value.unflatten(-1, (-1, self.dim))

    def queries(self, x: Tensor) -> Tensor:
        """Return queries `[..., num_heads, dim]`, not yet rotated."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.dim)))


@register_kind("block")
class BlockHeads(CachedHeads):
    """All nodes of a proposal share the slots; only the recurrent correction keeps a state along the path."""

    corrections = ("none", "parent", "recurrent")

    def __init__(self, config: HeadsConfig) -> None:
        size = config.hidden_size
        super().__init__(config, size, config.num_layers)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, BlockAttention(config), size) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.first = 0 if config.root_slot_predicts else 1  # the slot that predicts the root's children
        self.slots = config.depth + self.first
        learnt = config.mask_token_id < 0  # a vector for every slot, the first one added to the root
        self.mask_embedding = nn.Parameter(torch.randn(self.slots, size) * size**-0.5) if learnt else None
        self.mask_row: Tensor | None
        self.register_buffer("mask_row", None if learnt else torch.zeros(size))
        self.path_dependent = config.correction != "none"
        self.parent = ParentCorrection(size, config.correction_size) if config.correction == "parent" else None
        self.cell = GatedCell(size, config.correction_size, config.depth) if config.correction == "recurrent" else None
        later = torch.ones(self.slots, self.slots, dtype=torch.bool, device="cpu").triu(1)
        self.register_buffer("_later", later, persistent=False)

    def set_mask(self, row: Tensor) -> None:
        """Set the mask of heads with a `mask_token_id` to the target's embedding of that token, `[hidden]`."""
        assert self.mask_row is not None
        self.mask_row.copy_(row)

    def encode(self, embedding: Tensor, depth: int) -> Tensor:
        """Return the embedding, followed by the token's part of the correction."""
        correction = self.parent if self.cell is None else self.cell.encode
        return embedding if correction is None else torch.cat([embedding, correction(embedding)], -1)

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, max_len: int) -> Tensor:
        """Return every layer's keys and values of the fused feature; the token after it does not matter."""
        hidden = self.hidden_norm(self.fc(features))
        pairs = (cast(Any, layer).self_attn.keys_values(hidden) for layer in self.layers)
        return join_kv([(self.rotary(key, positions, max_len), value) for key, value in pairs])

    def init_state(self, features: Tensor, root: Tensor, cache: Any, depth: int | None = None) -> tuple[Tensor, Any]:
        """Run the layers over the block."""
        slots = self._run_block(root[..., : self.config.hidden_size], cache, depth)
        state = self.hidden_norm(self.fc(features)) if self.cell is not None else features[..., :0]
        return state, slots

    def step(self, state: Tensor, token: Tensor, depth: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of the depth's slot, corrected by the path."""
        slot, code = context[..., self.first + depth, :], token[..., self.config.hidden_size :]
        if self.cell is not None:
            state = self.cell(state, code, depth)
            return state, self.norm(slot + state)
        hidden = self.norm(slot)
        return state, hidden if self.parent is None else hidden + code

    def _run_block(self, root: Tensor, cache: DraftCacheView, depth: int | None) -> Tensor:
        """Map the root's embedding `[batch, anchors, hidden]` to slots `[batch, anchors, slots, hidden]`."""
        batch, anchors, _ = root.shape
        count = (
            depth + self.first if depth is not None and self.config.causal else self.slots
        )  # later ones change nothing
        if self.mask_embedding is not None:
            root, masks = root + self.mask_embedding[0], self.mask_embedding[1:count]
        else:
            assert self.mask_row is not None
            masks = self.mask_row.expand(count - 1, -1)
        x = torch.cat([root[:, :, None], masks.to(root.dtype).expand(batch, anchors, -1, -1)], 2)
        positions = cache.end[..., None] + torch.arange(count, device=root.device)
        max_len, visible = cache.rows.shape[1] + count, cache.visible()
        later = cast(Tensor, self._later)[:count, :count] if self.config.causal else None
        layer: Any
        for layer, text_kv in zip(self.layers, self.split_kv(cache.rows), strict=True):
            normed = layer.input_layernorm(x)
            key, value = layer.self_attn.keys_values(normed)
            block_kv = self.rotary(key, positions, max_len), value
            query = self.rotary(layer.self_attn.queries(normed), positions, max_len)
            x = layer(x, attend(query, text_kv, visible, block_kv, later))
        return x
