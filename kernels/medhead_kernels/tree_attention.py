"""Attention of a token tree over a preallocated cache, in Triton: split over the keys, one read of each key per key head.

The work of one (row, key head) is cut along the keys into `splits` pieces (Flash-Decoding, Dao et al. 2023), each with the
online softmax of FlashAttention (Dao et al. 2022) in float32; a second kernel merges the pieces by their log-sum-exp, in
a fixed order, so that the same input gives the same bits. All query heads of a group and all nodes share one query tile.
The committed prefix is read without a mask; in the tree's own columns a node sees what its ancestor words name. Lengths
are read on the device and the grid depends on shapes only, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from medhead_kernels.attn_metadata import Scoring, TreeColumns

MOST_SPLITS = 128
MERGE_ROWS = 8
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32. Triton's interpreter cannot multiply bfloat16; it is given the same numbers as float32."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _seen(words_at, depth_at, position, columns, first, length, nodes, window,
          WORDS: tl.constexpr, HAS_WINDOW: tl.constexpr):  # fmt: skip
    """`[rows, columns]`: the column is in the prefix, or is the node's ancestor or itself; and within the window.

    A block has at most 64 columns, so its tree columns lie in at most two neighbouring words.
    """
    inner = columns - length  # index of the node in that column; negative in the prefix
    index = tl.maximum(inner, 0)
    low = tl.maximum(first - length, 0) // 64
    at = low + tl.zeros_like(position)  # [rows]
    word_low = tl.load(words_at + at, mask=at < WORDS, other=0)
    word_high = tl.load(words_at + at + 1, mask=at + 1 < WORDS, other=0)
    word = tl.where((index // 64 == low)[None, :], word_low[:, None], word_high[:, None])
    ancestor = ((word >> (index % 64).to(tl.int64)[None, :]) & 1) != 0
    seen = (inner < 0)[None, :] | (ancestor & (inner < nodes)[None, :])
    if HAS_WINDOW:
        deep = tl.load(depth_at + index, mask=index < nodes, other=0).to(tl.int32)
        key_position = tl.where(inner < 0, columns, length + deep)
        seen = seen & (key_position[None, :] > position[:, None] - window)
    return seen


@triton.jit
def _absorb(q, keys_at, values_at, column, k_row, v_row, top, total, norm, acc, scale, softcap,
            words_at, depth_at, position, length, nodes, window,
            WORDS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
            BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
            MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys and values taken into the running maximum `top`, sum `norm` and weighted values `acc`."""
    columns = column + tl.arange(0, COLUMNS)
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_at = keys_at + columns[None, :] * k_row + d[:, None]
    v_at = values_at + columns[:, None] * v_row + v[None, :]
    if MASKED:  # what lies behind the tree is stale and may be anything
        inside = columns < total
        k = tl.load(k_at, mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        values = tl.load(v_at, mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at) if DIM == BLOCK_D else tl.load(k_at, mask=(d < DIM)[:, None], other=0.0)
        values = tl.load(v_at) if VALUE_DIM == BLOCK_V else tl.load(v_at, mask=(v < VALUE_DIM)[None, :], other=0.0)
    scores = _product(q, k, PRECISION) * scale
    if HAS_CAP:  # tanh by one exponential that cannot overflow
        shrunk = tl.exp2(tl.abs(scores) * (-2.0 * _LOG2_E / softcap))
        size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(scores < 0, -size, size)
    scores = scores * _LOG2_E
    if MASKED:
        seen = _seen(words_at, depth_at, position, columns, column, length, nodes, window, WORDS, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # a node may see nothing of this block
    weights = tl.exp2(scores - finite[:, None])
    fade = tl.exp2(top - finite)
    norm = norm * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + _product(weights.to(values.dtype), values, PRECISION)
    return new_top, norm, acc


@triton.jit(do_not_specialize=["nodes", "splits", "window"])
def split_kernel(query, key, value, words, depth, lengths, partial, logsum, scale, softcap, window, nodes, splits,
                 key_heads, q_batch, q_head, q_node, k_batch, k_head, k_row, v_batch, v_head, v_row,
                 w_batch, w_node, d_batch,
                 GROUP: tl.constexpr, WORDS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (query tiles, splits, batch * key_heads): one tile of rows (node, head of the group) over one piece of keys."""
    tile, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    total = length + nodes
    first = length * 0
    if HAS_WINDOW:  # no node sees anything before this column
        first = tl.maximum(length + 1 - window, 0) // COLUMNS * COLUMNS
    share = tl.cdiv(tl.cdiv(total - first, COLUMNS), splits) * COLUMNS
    begin = first + split * share
    end = tl.minimum(begin + share, total)

    rows = tile * ROWS + tl.arange(0, ROWS)
    used = tl.minimum(rows, nodes * GROUP - 1)  # rows behind the last repeat it and are not stored
    node, member = used // GROUP, used % GROUP
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_at = query + batch * q_batch + (head * GROUP + member)[:, None] * q_head + node[:, None] * q_node + d[None, :]
    q = tl.load(q_at) if DIM == BLOCK_D else tl.load(q_at, mask=(d < DIM)[None, :], other=0.0)
    keys_at = key + batch * k_batch + head * k_head
    values_at = value + batch * v_batch + head * v_head
    words_at = words + batch * w_batch + node * w_node
    depth_at = depth + batch * d_batch
    position = length + tl.load(depth_at + node).to(tl.int32)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    clear = begin  # up to here no mask is needed
    if not HAS_WINDOW:
        clear = begin + tl.maximum(tl.minimum(length, end) - begin, 0) // COLUMNS * COLUMNS
    for column in range(begin, clear, COLUMNS):
        top, norm, acc = _absorb(
            q, keys_at, values_at, column, k_row, v_row, top, total, norm, acc, scale, softcap,
            words_at, depth_at, position, length, nodes, window,
            WORDS, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, COLUMNS, HAS_CAP, HAS_WINDOW, False, PRECISION)  # fmt: skip
    for column in range(clear, end, COLUMNS):
        top, norm, acc = _absorb(
            q, keys_at, values_at, column, k_row, v_row, top, total, norm, acc, scale, softcap,
            words_at, depth_at, position, length, nodes, window,
            WORDS, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, COLUMNS, HAS_CAP, HAS_WINDOW, True, PRECISION)  # fmt: skip

    some = norm > 0
    place = (pair.to(tl.int64) * splits + split) * (nodes * GROUP) + rows
    inside = rows < nodes * GROUP
    tl.store(logsum + place, tl.where(some, top + tl.log2(tl.where(some, norm, 1.0)), float("-inf")), mask=inside)
    tl.store(partial + place[:, None] * VALUE_DIM + v[None, :], acc / tl.where(some, norm, 1.0)[:, None],
             mask=inside[:, None] & (v < VALUE_DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["nodes", "splits"])
def merge_kernel(partial, logsum, sinks, out, nodes, splits, key_heads,
                 GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
                 HAS_SINKS: tl.constexpr):  # fmt: skip
    """Grid (row tiles, batch * key_heads): the splits of some rows, merged in order, into `[batch, nodes, heads, dim]`."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // key_heads).to(tl.int64), pair % key_heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < nodes * GROUP
    v = tl.arange(0, BLOCK_V)
    there = inside[:, None] & (v < VALUE_DIM)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for split in range(splits):
        place = (pair.to(tl.int64) * splits + split) * (nodes * GROUP) + rows
        size = tl.load(logsum + place, mask=inside, other=0.0)
        part = tl.load(partial + place[:, None] * VALUE_DIM + v[None, :], mask=there, other=0.0)
        new_top = tl.maximum(top, size)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade, weight = tl.exp2(top - finite), tl.exp2(size - finite)
        norm = norm * fade + weight
        acc = acc * fade[:, None] + part * weight[:, None]
        top = new_top
    heads = head * GROUP + rows % GROUP
    if HAS_SINKS:  # a score that takes part in the softmax and has no value
        sink = tl.load(sinks + heads, mask=inside, other=0.0).to(tl.float32) * _LOG2_E
        new_top = tl.maximum(top, sink)
        fade = tl.exp2(top - new_top)
        norm = norm * fade + tl.exp2(sink - new_top)
        acc = acc * fade[:, None]
    place = (batch * nodes + rows // GROUP) * (key_heads * GROUP) + heads
    result = acc / norm[:, None]
    tl.store(out + place[:, None] * VALUE_DIM + v[None, :], result.to(out.dtype.element_ty), mask=there)


class Tile(NamedTuple):
    """Sizes of a block: rows (node and head) by columns (keys), and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int


def tile_for(rows: int, dim: int, dtype: torch.dtype, roomy: bool = True) -> Tile:
    """The block for so many rows of a head size.

    Args:
        rows: nodes times heads of a group.
        dim: the larger of head size and value size.
        dtype: of queries, keys and values.
        roomy: the device gives a block 163 KiB of shared memory (A100, H100), else 99 KiB.
    """
    most, wide = 128 if roomy else 64, triton.next_power_of_2(dim) > 128
    block = max(16, min(triton.next_power_of_2(rows), most))
    if dtype == torch.float32:
        return Tile(min(block, 16 if wide else 32), 16 if wide else 32, 4, 2)
    return Tile(block, 32 if wide else 64, 8 if block > 64 else 4, 3 if roomy and not wide else 2)


def splits_for(programs: int, columns: int, tile: Tile, processors: int) -> int:
    """Pieces of the keys: enough programs for two on every processor, none smaller than two blocks of columns."""
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, columns // (2 * tile.columns), MOST_SPLITS))


def attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeColumns, scoring: Scoring, splits: int | None = None
) -> Tensor:
    """Attention of every node over its row's committed prefix and its own ancestors.

    Args:
        query: `[batch, heads, nodes, dim]`, 1 to 256 nodes.
        key: `[batch, key_heads, columns, dim]`, a view into the cache. What lies behind a row's nodes is not read.
        value: `[batch, key_heads, columns, value_dim]`.
        tree: lengths (read on the device), ancestor words and depths; `length + nodes <= columns`.
        scoring: scale, window, soft-capping, sinks.
        splits: pieces of the keys; None chooses from shapes and device.

    Returns:
        `[batch, nodes, heads, value_dim]` of the query's type.
    """
    batch, heads, nodes, dim = query.shape
    key_heads, columns, value_dim = key.shape[1], key.shape[2], value.shape[3]
    assert key.stride(3) == value.stride(3) == 1, "keys and values must be contiguous along a head"
    query = query if query.stride(3) == 1 else query.contiguous()
    words, depth, window = tree.words.contiguous(), tree.depth.contiguous(), scoring.window
    rows, pairs = nodes * (heads // key_heads), batch * key_heads
    processors, roomy = _device(query.device)
    tile = tile_for(rows, max(dim, value_dim), query.dtype, roomy)
    tiles = triton.cdiv(rows, tile.rows)
    if splits is None:
        splits = splits_for(pairs * tiles, columns, tile, processors)
    partial = query.new_empty(pairs, splits, rows, value_dim, dtype=torch.float32)
    logsum = query.new_empty(pairs, splits, rows, dtype=torch.float32)
    out = query.new_empty(batch, nodes, heads, value_dim)
    split_kernel[tiles, splits, pairs](
        query, key, value, words, depth, tree.lengths, partial, logsum,
        scoring.scale, scoring.softcap or 0.0, window or 0, nodes, splits, key_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        words.stride(0) if words.shape[0] > 1 else 0, words.stride(1), depth.stride(0) if depth.shape[0] > 1 else 0,
        **split_constants(tile, heads // key_heads, words.shape[2], dim, value_dim, query.dtype, scoring.softcap, window),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_kernel[triton.cdiv(rows, MERGE_ROWS), pairs](
        partial, logsum, scoring.sinks, out, nodes, splits, key_heads,
        **merge_constants(heads // key_heads, value_dim, scoring.sinks is not None), num_warps=4,
    )  # fmt: skip
    return out


def split_constants(
    tile: Tile, group: int, words: int, dim: int, value_dim: int, dtype: torch.dtype, softcap: Any, window: Any
) -> dict[str, Any]:
    """Compile-time values of `split_kernel`."""
    return {
        "GROUP": group,
        "WORDS": words,
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "HAS_CAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "PRECISION": _precision(dtype),
    }


def merge_constants(group: int, value_dim: int, has_sinks: bool) -> dict[str, Any]:
    """Compile-time values of `merge_kernel`."""
    return {
        "GROUP": group,
        "VALUE_DIM": value_dim,
        "BLOCK_V": triton.next_power_of_2(value_dim),
        "ROWS": MERGE_ROWS,
        "HAS_SINKS": has_sinks,
    }


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on the CPU, slowly."""
    return not isinstance(split_kernel, triton.JITFunction)


def _precision(dtype: torch.dtype) -> str:
    """How products are made: float32 never as TF32; for the halves the name means nothing to a GPU."""
    return "widened" if dtype == torch.bfloat16 and interpreted() else "ieee"


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[int, bool]:
    """Its number of multiprocessors, and whether a block may have 163 KiB of shared memory."""
    if device.type != "cuda":
        return 1, False
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"] >= 163 * 1024
