"""PyTorch's FlexAttention over the same cache, to be compared with: the tree is a rule on indices, compiled into its kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medhead_kernels.attn_metadata import TreeColumns


def prepared(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scale: float, compiles: bool = True
) -> Callable[[], Tensor]:
    """A call of FlexAttention; its block mask is made beforehand.

    Args:
        query: `[batch, heads, nodes, dim]`.
        key: `[batch, key_heads, columns, dim]`.
        value: `[batch, key_heads, columns, dim]`.
        tree: what the columns are.
        scale: factor of the scores.
        compiles: compile it, as it is meant to be used; plain, it is slow and needs no compiler.

    Returns:
        A function that returns `[batch, nodes, heads, dim]`.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, _, nodes, _ = query.shape
    lengths, visible = tree.lengths.long(), tree.visible.expand(batch, nodes, nodes)

    def seen(row: Tensor, head: Tensor, node: Tensor, column: Tensor) -> Tensor:
        inner = column - lengths[row]
        ancestor = visible[row, node, inner.clamp(0, nodes - 1)] & (inner < nodes)
        return (inner < 0) | ancestor

    mask = create_block_mask(seen, batch, None, nodes, key.shape[2], device=str(query.device))
    attend: Any = torch.compile(flex_attention) if compiles else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return partial(_call, partial(attend, query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped))


def _call(attend: Callable[[], Tensor]) -> Tensor:
    return attend().transpose(1, 2)
