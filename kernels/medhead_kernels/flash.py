"""Prefix attention by a flash kernel that returns the log-sum-exp, the tree's own block beside it, merged exactly.

Attention over two disjoint sets of keys is the two results weighted by their shares of the softmax's denominator, which
the log-sum-exps give (Milakov and Gimelshein 2018; Flash-Decoding, Dao et al. 2023). Every node sees the whole prefix, so
that part needs no mask and a kernel made for ordinary text does it: flash-attn's where it is installed, else PyTorch's own.
Nodes and the heads of a group lie behind each other in the query, so a key is read once for all of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from medhead_kernels.attn_metadata import Scoring, TreeColumns


def attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> Tensor:
    """Tree attention; shapes as in `tree_attention.attention`, without a window.

    Returns:
        `[batch, nodes, heads, value_dim]` of the query's type.
    """
    batch, heads, nodes, _ = query.shape
    key_heads = key.shape[1]
    group = heads // key_heads
    packed = (
        query.unflatten(1, (key_heads, group)).transpose(2, 3).flatten(2, 3)
    )  # [batch, key_heads, nodes * group, dim]
    prefix, prefix_size = _prefix(packed, key, value, tree, scoring)
    own, own_size = _own_block(packed, key, value, tree, group, scoring)
    size = torch.logaddexp(prefix_size, own_size)  # [batch, key_heads, nodes * group]
    if scoring.sinks is not None:
        extra = scoring.sinks.float().view(key_heads, 1, group).expand(-1, nodes, -1).flatten(1)
        size = torch.logaddexp(size, extra)
    out = own * (own_size - size).exp()[..., None] + prefix.float() * (prefix_size - size).exp()[..., None]
    out = out.unflatten(2, (nodes, group)).permute(0, 2, 1, 3, 4)
    return out.reshape(batch, nodes, heads, value.shape[3]).to(query.dtype)


def _own_block(
    packed: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, group: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Nodes over nodes, in float32: `[batch, key_heads, rows, dim]` and its log-sum-exp."""
    nodes = tree.nodes
    if tree.uniform:
        start = tree.host_lengths[0]
        key, value = key[:, :, start : start + nodes], value[:, :, start : start + nodes]
    else:
        where = (tree.lengths.long()[:, None] + torch.arange(nodes, device=key.device))[:, None, :, None]
        key = key.gather(2, where.expand(-1, key.shape[1], -1, key.shape[3]))
        value = value.gather(2, where.expand(-1, value.shape[1], -1, value.shape[3]))
    scores = (packed @ key.transpose(-1, -2)).float() * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    hidden = ~tree.visible.repeat_interleave(group, 1)[:, None]  # [batch or 1, 1, rows, nodes]
    scores = scores.masked_fill(hidden, float("-inf"))
    size = scores.logsumexp(-1)
    return (scores - size[..., None]).exp() @ value.float(), size


def _prefix(packed: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Every row over its committed prefix: `[batch, key_heads, rows, dim]` and its log-sum-exp (-inf where there is none)."""
    if packed.device.type == "cuda" and flash_attn_installed():
        return _by_flash_attn(packed, key, value, tree, scoring)
    out = packed.new_zeros(*packed.shape[:3], value.shape[3])
    size = torch.full(packed.shape[:3], float("-inf"), dtype=torch.float32, device=packed.device)
    for length in sorted(
        set(tree.host_lengths) - {0}
    ):  # PyTorch's kernel has one length for all rows: equal rows together
        rows: slice | list[int] = slice(None)
        if not tree.uniform:
            rows = [row for row, other in enumerate(tree.host_lengths) if other == length]
        out[rows], size[rows] = _by_torch(packed[rows], key[rows, :, :length], value[rows, :, :length], scoring.scale)
    return out, size


def _by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash kernel, without a mask."""
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return found[0], found[1][:, :, : query.shape[2]]


def _by_flash_attn(
    packed: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """flash-attn 2: lengths are read on the device, and it splits long prefixes over the processors by itself."""
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found,unused-ignore]

    out, size = flash_attn_with_kvcache(
        packed.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=tree.lengths,
        softmax_scale=scoring.scale,
        causal=False,
        softcap=scoring.softcap or 0.0,
        return_softmax_lse=True,
    )
    empty = (tree.lengths == 0)[:, None, None]  # there it answers with +inf
    out = out.transpose(1, 2).masked_fill(empty[..., None], 0.0)
    return out, size[:, :, : packed.shape[2]].masked_fill(empty, float("-inf"))


@lru_cache(maxsize=1)
def flash_attn_installed() -> bool:
    """Whether flash-attn 2 can be imported."""
    try:
        from flash_attn import flash_attn_with_kvcache  # noqa: F401
    except ImportError:
        return False
    return True
