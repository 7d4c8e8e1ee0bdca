"""PyTorch's FlexAttention over the same cache, for benchmarks; the tree is a mask function compiled into its kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medhead_kernels.attn_metadata import TreeMetadata


def prepare(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, scale: float, compiled: bool = True
) -> Callable[[], Tensor]:
    """Return a function that runs FlexAttention; shapes as in `Backend`. The block mask is built here, outside the timing.

    Without `compiled` (torch.compile) the function is slow and needs no compiler.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, _, nodes, _ = query.shape
    lengths, visible = tree.lengths.long(), tree.visible.expand(batch, nodes, nodes)

    def mask_mod(row: Tensor, head: Tensor, node: Tensor, column: Tensor) -> Tensor:
        inner = column - lengths[row]
        return (inner < 0) | (visible[row, node, inner.clamp(0, nodes - 1)] & (inner < nodes))

    mask = create_block_mask(mask_mod, batch, None, nodes, key.shape[2], device=str(query.device))
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention
    options = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    return lambda: attend(query, key, value, **options).transpose(1, 2)
