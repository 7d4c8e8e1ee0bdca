"""What the attention and the block kind share: fused features of the target, and keys and values of every committed token."""

from __future__ import annotations

import torch
from torch import Tensor

from medhead.errors import MedheadError
from medhead.heads.base import Heads, HeadsConfig
from medhead.heads.layers import Rotary, fuse_layers


class CachedHeads(Heads):
    """Base class of kinds that attend to the whole text (`DraftCacheView`), with `num_layers` layers of width `size`."""

    fuses_layers = True

    def __init__(self, config: HeadsConfig, size: int, num_layers: int) -> None:
        super().__init__(config)
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise MedheadError(
                f"num_heads must be a multiple of num_kv_heads and head_dim even, got {config.num_heads}, "
                f"{config.num_kv_heads} and {config.head_dim}"
            )
        self.num_kv_heads, self.dim = config.num_kv_heads, config.head_dim
        self.fc = fuse_layers(self.feature_size, size)
        self.rotary = Rotary(self.dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.cache_entry_size = num_layers * 2 * self.num_kv_heads * self.dim

    def split_kv(self, entries: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split `[..., length, cache_entry_size]` into every layer's keys and values `[..., length, num_kv_heads, dim]`."""
        parts = entries.unflatten(-1, (-1, 2, self.num_kv_heads, self.dim))
        return [(parts[..., layer, 0, :, :], parts[..., layer, 1, :, :]) for layer in range(parts.shape[-4])]


def join_kv(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Concatenate every layer's keys and values `[..., num_kv_heads, dim]` to cache entries: the inverse of `split_kv`."""
    return torch.cat([part.flatten(-2) for pair in pairs for part in pair], -1)
