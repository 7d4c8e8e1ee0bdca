"""Attention by a flash kernel over the prefix and plain PyTorch inside the tree, merged by log-sum-exp.

Attention over two disjoint sets of keys is the two results weighted by their shares of the softmax's denominator, which
the log-sum-exps give (Milakov and Gimelshein 2018; Flash-Decoding, Dao et al. 2023). Every node sees the whole prefix, so
that part needs no mask: flash-attn's kernel computes it where installed, else PyTorch's. Nodes and the query heads of a
group share one query dimension, so each key is read once for all of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from medhead_kernels.attn_metadata import AttnParams, TreeMetadata
from medhead_kernels.causal import flash_kernel


def attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams) -> Tensor:
    """Compute tree attention; arguments and result as in `Backend`, without a window."""
    batch, heads, nodes, _ = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    packed = (
        query.unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(2, 3)
    )  # [batch, kv_heads, nodes * group, dim]
    prefix_out, prefix_lse = _prefix_attention(packed, key, value, tree, params)
    tree_out, tree_lse = _attention_inside_tree(packed, key, value, tree, group, params)
    lse = torch.logaddexp(prefix_lse, tree_lse)  # [batch, kv_heads, nodes * group]
    if params.sinks is not None:
        sinks = params.sinks.float().view(kv_heads, 1, group).expand(-1, nodes, -1).flatten(1)
        lse = torch.logaddexp(lse, sinks)
    out = tree_out * (tree_lse - lse).exp()[..., None] + prefix_out.float() * (prefix_lse - lse).exp()[..., None]
    out = out.unflatten(2, (nodes, group)).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, nodes, heads, value.shape[3]).to(query.dtype)


def _attention_inside_tree(
    packed: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, group: int, params: AttnParams
) -> tuple[Tensor, Tensor]:
    """Return nodes over nodes, `[batch, kv_heads, rows, dim]` in float32, and the log-sum-exp."""
    nodes = tree.nodes
    if tree.uniform:
        start = tree.host_lengths[0]
        key, value = key[:, :, start : start + nodes], value[:, :, start : start + nodes]
    else:
        columns = (tree.lengths.long()[:, None] + torch.arange(nodes, device=key.device))[:, None, :, None]
        key, value = (t.gather(2, columns.expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value))
    scores = (packed @ key.transpose(-1, -2)).float() * params.scale
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    hidden = ~tree.visible.repeat_interleave(group, 1)[:, None]  # [batch or 1, 1, rows, nodes]
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.float(), lse


def _prefix_attention(
    packed: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams
) -> tuple[Tensor, Tensor]:
    """Return all nodes over the committed prefix and the log-sum-exp, which is -inf for a row without a prefix."""
    if packed.device.type == "cuda" and flash_attn_installed():
        return _prefix_by_flash_attn(packed, key, value, tree, params)
    out = packed.new_zeros(*packed.shape[:3], value.shape[3])
    lse = torch.full(packed.shape[:3], float("-inf"), dtype=torch.float32, device=packed.device)
    for length in sorted(set(tree.host_lengths) - {0}):  # PyTorch's kernel takes one length for all rows
        rows: slice | list[int] = slice(None)
        if not tree.uniform:
            rows = [row for row, other in enumerate(tree.host_lengths) if other == length]
        prefix = key[rows, :, :length], value[rows, :, :length]
        out[rows], lse[rows] = flash_kernel(packed[rows], *prefix, params.scale)
    return out, lse


def _prefix_by_flash_attn(
    packed: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams
) -> tuple[Tensor, Tensor]:
    """Use flash-attn 2, which reads lengths on the device and splits long prefixes over the multiprocessors."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found,unused-ignore]

    query, keys, values = (tensor.transpose(1, 2) for tensor in (packed, key, value))
    options = {"softmax_scale": params.scale, "softcap": params.softcap or 0.0, "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(query, keys, values, cache_seqlens=tree.lengths, causal=False, **options)
    empty = (tree.lengths == 0)[:, None, None]  # flash-attn returns +inf for an empty prefix
    out = out.transpose(1, 2).masked_fill(empty[..., None], 0.0)
    return out, lse[:, :, : packed.shape[2]].masked_fill(empty, float("-inf"))


@lru_cache(maxsize=1)
def flash_attn_installed() -> bool:
    """Whether flash-attn 2 can be imported."""
    try:
        from flash_attn import flash_attn_with_kvcache  # noqa: F401
    except ImportError:
        return False
    return True
