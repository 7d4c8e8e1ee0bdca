"""Attention of tree nodes on a CPU whose bits depend on each node's own path alone.

The result for a node is the same whatever other nodes and rows the pass has, however many threads there are, and wherever in
the cache the keys of its ancestors lie. A block of keys is read once for all nodes. The kernel is in `cpu_attention.cpp`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from medhead_kernels import native

LANES = 8  # dimensions of keys and values must be multiples of it


@cache
def unavailable() -> str | None:
    """Load the kernel; return None, or one line that says why it cannot be used on this machine."""
    return native.unavailable("cpu_attention")


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, depth: Tensor, path: Tensor, scale: float,
    first: Tensor | None = None, sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Map queries `[batch, heads, nodes, dim]` to `[batch, nodes, heads, value_dim]`; sums are in float32.

    Args:
        query: of every node; the type is float32, bfloat16 or float16.
        key: `[batch, kv_heads, tokens, dim]`, of the committed tokens and after them of the nodes in their order.
        value: `[batch, kv_heads, tokens, value_dim]`.
        lengths: `[batch]` int64, committed tokens of every row.
        depth: `[batch, nodes]` int64.
        path: `[batch, nodes, deepest + 1]` int64, the nodes from the root to each node; what follows is not read.
        scale: factor of the scores.
        first: `[batch, nodes]` int64, the first position that a node sees; None for 0.
        sinks: `[heads]` float32, scores of a key without a value; None for none.
        softcap: bound of the scores; None for none.
    """
    return torch.ops.medhead.path_attention(
        query, key, value, lengths, depth, path, first, sinks, scale, softcap or 0.0
    )
