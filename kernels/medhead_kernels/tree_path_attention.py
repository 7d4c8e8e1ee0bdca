"""`path_attention` in Triton: attention of tree nodes whose bits depend on each node's own path alone.

Keys are counted by their position in the text and cut into blocks and spans at multiples of fixed numbers, whatever the tree, the
batch and the GPU are. A program sums the blocks of one span for a tile of 16 rows (node, head of the group); a second kernel adds
the spans in their order, `MERGED` at a time. The tile has one size for every number of nodes, and nothing that depends on a pass
is a compile-time value, so every pass runs the same instructions.

A block of committed keys is read once for all rows of the tile. A block that holds keys of the tree is read once for every node,
in the order of the node's path, by the same instructions: a row keeps the product of its own node. So all that enters a row is
what would enter it if its path were committed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from medhead_kernels.tree_attention import LOG2_E, Tile, capped, dot, dot_precision, tile_for

ROWS = 16  # of a tile: the fewest that tensor cores multiply
SPAN = 256  # positions that one program sums
MERGED = 16  # spans that are added at once
# what differs between passes: neither 1 nor a multiple of 16 may give other instructions
OF_PASSES = ["nodes", "spans", "deep", "query_batch", "query_head", "query_node", "key_batch", "key_head", "value_batch",
              "value_head"]  # fmt: skip


@triton.jit
def _rows_of(positions, node, length, depth, path, deep):  # type: ignore[no-untyped-def]
    """Return the cache rows of the keys at these positions of a node's text, and which positions the text has."""
    inner = positions - length
    inside = inner <= tl.load(depth + node).to(tl.int32)
    own = tl.load(path + node * deep + inner, mask=(inner >= 0) & inside, other=0).to(tl.int32)
    return tl.where(inner < 0, positions, length + own), inside


@triton.jit(do_not_specialize=OF_PASSES)
def span_kernel(query, key, value, lengths, depth, path, first, partial, largest, total, scale, softcap, nodes, spans, deep,  # type: ignore[no-untyped-def]
                kv_heads, query_batch, query_head, query_node, key_batch, key_head, value_batch, value_head,
                GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, HAS_CAP: tl.constexpr, HAS_FIRST: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Grid (tiles, spans, batch * kv_heads): sum one span for one tile. Strides are in rows of `DIM` or `VALUE_DIM` numbers."""
    tile, span, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (batch_head // kv_heads).to(tl.int64), (batch_head % kv_heads).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    rows = tile * ROWS + tl.arange(0, ROWS)
    used = tl.minimum(rows, nodes * GROUP - 1)  # surplus rows repeat the last one and are not stored
    node, group_head = used // GROUP, used % GROUP
    first_node, last_node = tile * ROWS // GROUP, tl.minimum((tile * ROWS + ROWS - 1) // GROUP, nodes - 1)
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_row = batch * query_batch + (head * GROUP + group_head) * query_head + node * query_node
    q = tl.load(query + q_row[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    key_base = key + (batch * key_batch + head * key_head) * DIM
    value_base = value + (batch * value_batch + head * value_head) * VALUE_DIM
    last = length + tl.load(depth + batch * nodes + node).to(tl.int32)
    begin, end = span * SPAN, tl.minimum(span * SPAN + SPAN, tl.max(last, 0) + 1)
    start = last * 0
    if HAS_FIRST:
        start = tl.load(first + batch * nodes + node).to(tl.int32)
        begin = tl.maximum(begin, tl.min(start, 0) // BLOCK * BLOCK)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for column in range(begin, end, BLOCK):
        positions = column + tl.arange(0, BLOCK)
        committed = column + BLOCK <= length
        count = tl.where(committed, 1, last_node - first_node + 1)
        scores = tl.zeros([ROWS, BLOCK], tl.float32)
        for index in range(count):
            one = first_node + index
            at, inside = _rows_of(positions, batch * nodes + one, length, depth, path, deep)
            k = tl.load(key_base + at[None, :] * DIM + d[:, None], mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
            scores = tl.where((committed | (node == one))[:, None], dot(q, k, PRECISION), scores)
        scores = capped(scores * scale, softcap, HAS_CAP)
        visible = (positions[None, :] <= last[:, None]) & (positions[None, :] >= start[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may see no key of this block
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(row_max - safe_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        weighted = tl.zeros([ROWS, BLOCK_V], tl.float32)
        for index in range(count):
            one = first_node + index
            at, inside = _rows_of(positions, batch * nodes + one, length, depth, path, deep)
            v_at = value_base + at[:, None] * VALUE_DIM + v[None, :]
            values = tl.load(v_at, mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
            product = dot(weights.to(values.dtype), values, PRECISION)
            weighted = tl.where((committed | (node == one))[:, None], product, weighted)
        acc = acc * rescale[:, None] + weighted
        row_max = new_max

    place = (batch_head.to(tl.int64) * spans + span) * (nodes * GROUP) + rows
    stored = rows < nodes * GROUP
    tl.store(largest + place, row_max, mask=stored)
    tl.store(total + place, row_sum, mask=stored)
    tl.store(partial + place[:, None] * VALUE_DIM + v[None, :], acc, mask=stored[:, None] & (v < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["nodes", "spans"])
def add_kernel(partial, largest, total, sinks, out, nodes, spans, kv_heads,  # type: ignore[no-untyped-def]
               GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, MERGED: tl.constexpr,
               HAS_SINKS: tl.constexpr):  # fmt: skip
    """Grid (nodes * group, batch * kv_heads): add the spans of a row, into `[batch, nodes, heads, dim]`.

    Spans after a row's last one add zeros, so their number changes no bit.
    """
    row, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // kv_heads).to(tl.int64), batch_head % kv_heads
    v = tl.arange(0, BLOCK_V)
    base, step = batch_head.to(tl.int64) * spans * (nodes * GROUP) + row, nodes * GROUP
    row_max = tl.full([1], float("-inf"), tl.float32)
    if HAS_SINKS:  # a score that takes part in the softmax and carries no value
        sink = tl.load(sinks + head * GROUP + row % GROUP).to(tl.float32) * LOG2_E
        row_max = tl.maximum(row_max, sink)
    for begin in range(0, spans, MERGED):
        span = begin + tl.arange(0, MERGED)
        sizes = tl.load(largest + base + span * step, mask=span < spans, other=float("-inf"))
        row_max = tl.maximum(row_max, tl.max(sizes, 0))
    row_sum, acc = tl.zeros([1], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    if HAS_SINKS:
        row_sum = tl.exp2(sink - row_max)
    for begin in range(0, spans, MERGED):
        span = begin + tl.arange(0, MERGED)
        place, inside = base + span * step, span < spans
        weights = tl.exp2(tl.load(largest + place, mask=inside, other=float("-inf")) - row_max)
        row_sum += tl.sum(weights * tl.load(total + place, mask=inside, other=0.0), 0)
        parts = tl.load(partial + place[:, None] * VALUE_DIM + v[None, :],
                        mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0)  # fmt: skip
        acc += tl.sum(parts * weights[:, None], 0)
    target = (batch * nodes + row // GROUP) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    tl.store(out + target * VALUE_DIM + v, (acc / row_sum).to(out.dtype.element_ty), mask=v < VALUE_DIM)


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, depth: Tensor, path: Tensor, scale: float,
    first: Tensor | None = None, sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Do what `path_attention.attention` does, for heads of up to 256 numbers.

    The path is not checked against the cache: a wrong one reads other rows.
    """
    batch, heads, nodes, dim = query.shape
    kv_heads, columns, value_dim = key.shape[1], key.shape[2], value.shape[3]
    assert key.dtype == value.dtype == query.dtype, "queries, keys and values must have one type"
    assert (key.stride(2), value.stride(2)) == (dim, value_dim), "rows of keys and values must follow each other"
    assert depth.shape == path.shape[:2] == (batch, nodes), "the tree must have a row for every row of the queries"
    depth, path, first = depth.contiguous(), path.contiguous(), None if first is None else first.contiguous()
    if query.stride(3) != 1 or any(stride % dim for stride in query.stride()[:3]):
        query = query.contiguous()
    group, tile, spans = heads // kv_heads, tile_for(ROWS, max(dim, value_dim), query.dtype), triton.cdiv(columns, SPAN)
    rows, batch_heads = nodes * group, batch * kv_heads
    partial = query.new_empty(batch_heads, spans, rows, value_dim, dtype=torch.float32)
    largest, total = partial.new_empty(batch_heads, spans, rows), partial.new_empty(batch_heads, spans, rows)
    out = query.new_empty(batch, nodes, heads, value_dim)
    with torch.cuda.device_of(query):
        span_kernel[triton.cdiv(rows, ROWS), spans, batch_heads](
            query, key, value, lengths, depth, path, first, partial, largest, total,
            scale * (1.0 if softcap else LOG2_E.value), softcap or 0.0, nodes, spans, path.shape[2], kv_heads,
            *_row_strides(query, 3), *_row_strides(key, 2), *_row_strides(value, 2),
            **span_constants(tile, group, dim, value_dim, query.dtype, softcap, first is not None),
            **launch_options(tile),
        )  # fmt: skip
        add_kernel[rows, batch_heads](
            partial, largest, total, sinks, out, nodes, spans, kv_heads,
            **add_constants(group, value_dim, sinks is not None), num_warps=4,
        )  # fmt: skip
    return out


def span_constants(
    tile: Tile, group: int, dim: int, value_dim: int, dtype: torch.dtype, softcap: float | None, has_first: bool
) -> dict[str, Any]:
    """Return the compile-time values of `span_kernel`."""
    return {
        "GROUP": group, "DIM": dim, "VALUE_DIM": value_dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)), "ROWS": ROWS, "BLOCK": tile.columns, "SPAN": SPAN,
        "HAS_CAP": softcap is not None, "HAS_FIRST": has_first, "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def add_constants(group: int, value_dim: int, has_sinks: bool) -> dict[str, Any]:
    """Return the compile-time values of `add_kernel`."""
    block = triton.next_power_of_2(value_dim)
    return {"GROUP": group, "VALUE_DIM": value_dim, "BLOCK_V": block, "MERGED": MERGED, "HAS_SINKS": has_sinks}


def launch_options(tile: Tile) -> dict[str, int]:
    """Return warps and stages of `span_kernel`; its inner loops are too short to load ahead."""
    return {"num_warps": tile.warps, "num_stages": 1}


def _row_strides(tensor: Tensor, count: int) -> list[int]:
    """Return the first strides in rows: a multiple of the row's size, as the compiler knows, whatever their number is."""
    size = tensor.shape[3]
    strides = tensor.stride()[:count]
    assert tensor.stride(3) == 1, "rows must be contiguous"
    assert not any(stride % size for stride in strides), f"strides {strides} are no multiples of {size}"
    return [stride // size for stride in strides]
