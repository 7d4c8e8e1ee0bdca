"""Rotary positions and the write to the key/value cache in one launch (Triton), with a plain PyTorch reference.

The queries are rotated in place, the keys on their way to the cache, and the values are copied. Products are rounded where
PyTorch rounds them and never fused with the addition, so the results equal PyTorch's bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rope_write_kernel(query, key, value, cos, sin, rows, keys, values, nodes, heads, kv_heads,  # type: ignore[no-untyped-def]
                      q_batch, q_head, q_node, k_batch, k_head, k_node, v_batch, v_head, v_node,
                      c_batch, c_node, r_batch, s_batch, s_head, s_row, t_batch, t_head, t_row,
                      HALF: tl.constexpr, BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Grid (batch * nodes, heads + 2 * kv_heads): rotate or copy one head of one node."""
    token, head = tl.program_id(0), tl.program_id(1)
    batch, node = (token // nodes).to(tl.int64), (token % nodes).to(tl.int64)
    place = tl.load(rows + batch * r_batch + node)
    if head < heads + kv_heads:
        if head < heads:
            source = query + batch * q_batch + head * q_head + node * q_node
            target = source
        else:
            source = key + batch * k_batch + (head - heads) * k_head + node * k_node
            target = keys + batch * s_batch + (head - heads) * s_head + place * s_row
        d = tl.arange(0, BLOCK)
        inside = d < HALF
        angle = batch * c_batch + node * c_node + d
        low = tl.load(source + d, mask=inside, other=0.0)
        high = tl.load(source + HALF + d, mask=inside, other=0.0)
        cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos_high = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin_high = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        x, y = low.to(tl.float32), high.to(tl.float32)
        new_low = (x * cos_low).to(low.dtype).to(tl.float32) - (y * sin_low).to(low.dtype).to(tl.float32)
        new_high = (y * cos_high).to(low.dtype).to(tl.float32) + (x * sin_high).to(low.dtype).to(tl.float32)
        tl.store(target + d, new_low.to(low.dtype), mask=inside)
        tl.store(target + HALF + d, new_high.to(low.dtype), mask=inside)
    else:
        at = (head - heads - kv_heads).to(tl.int64)
        v = tl.arange(0, BLOCK_V)
        copied = tl.load(value + batch * v_batch + at * v_head + node * v_node + v, mask=v < VALUE_DIM, other=0.0)
        tl.store(values + batch * t_batch + at * t_head + place * t_row + v, copied, mask=v < VALUE_DIM)


def rope_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Rotate `query` in place, and write the rotated `key` and `value` to the cache.

    Args:
        query: `[batch, heads, nodes, dim]`, any strides but the last, which is 1.
        key: `[batch, kv_heads, nodes, dim]`, likewise.
        value: `[batch, kv_heads, nodes, value_dim]`, likewise.
        cos: `[batch or 1, nodes, dim]`, of one dtype with all others.
        sin: like `cos`.
        rows: `[batch or 1, nodes]` int64, row of the cache of every node.
        keys: `[batch, kv_heads, tokens, dim]`, the cache.
        values: `[batch, kv_heads, tokens, value_dim]`, the cache.
    """
    batch, heads, nodes, dim = query.shape
    tensors = (query, key, value, cos, sin, keys, values)
    assert all(tensor.stride(-1) == 1 and tensor.dtype == query.dtype for tensor in tensors), "other rows or dtypes"
    assert cos.stride() == sin.stride() and rows.stride(1) == 1, "other strides"  # noqa: PT018
    kv_heads = key.shape[1]
    with torch.cuda.device_of(query):
        rope_write_kernel[batch * nodes, heads + 2 * kv_heads](
            query, key, value, cos, sin, rows, keys, values, nodes, heads, kv_heads,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), rows.stride(0) if len(rows) > 1 else 0,
            *keys.stride()[:3], *values.stride()[:3], **constants(dim, value.shape[3]), num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def constants(dim: int, value_dim: int) -> dict[str, Any]:
    """Return the compile-time values of the kernel."""
    return {
        "HALF": dim // 2,
        "BLOCK": triton.next_power_of_2(dim // 2),
        "VALUE_DIM": value_dim,
        "BLOCK_V": triton.next_power_of_2(value_dim),
    }


def reference(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Do the same by plain PyTorch."""
    index = rows.expand(len(keys), -1)[:, None, :, None]
    keys.scatter_(2, index.expand_as(key), rotate(key, cos, sin))
    values.scatter_(2, index.expand_as(value), value)
    query.copy_(rotate(query, cos, sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads `[batch, heads, nodes, dim]` turned by the angles of their nodes `[batch or 1, nodes, dim]`."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
