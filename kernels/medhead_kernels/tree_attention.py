"""Attention of a token tree over a preallocated cache, in Triton: split over the keys, each key read once per KV head.

The keys of one (row, KV head) are cut into `splits` pieces (Flash-Decoding, Dao et al. 2023), each processed with
FlashAttention's online softmax (Dao et al. 2022) in float32; a second kernel merges all pieces of a row at once by their
log-sum-exp, in a fixed order, so equal inputs give equal bits. All query heads of a group and all nodes share one query
tile. The committed prefix is read without a mask; in the tree's columns a node sees the nodes set in its ancestor bitmask.
Lengths are read on the device and the grid depends on shapes only, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from medhead_kernels.attn_metadata import AttnParams, TreeMetadata

MAX_SPLITS = 64  # which one program merges at once
_SPLIT_COST = 0.005  # of one more split, relative to reading all keys of a row and head by one program
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return `a @ b` in float32; bfloat16 is cast first under Triton's interpreter, which cannot multiply it."""
    if PRECISION == "cast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def capped(scores, softcap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores soft-capped, in units of log(2), in which they are given without a cap."""
    if HAS_CAP:  # tanh by one exponential that cannot overflow
        decay = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
        size = (softcap * LOG2_E) * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores < 0, -size, size)
    return scores


@triton.jit
def _visible(bitmask_base, depth_base, position, columns, first, length, nodes, window,  # type: ignore[no-untyped-def]
             MASK_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Return `[rows, columns]`: the column is in the prefix, the node or its ancestor, and inside the window.

    A block has at most 64 columns, so its tree columns lie in at most two neighbouring elements of the bitmask.
    """
    inner = columns - length  # node index of the column; negative in the prefix
    index = tl.maximum(inner, 0)
    low = tl.maximum(first - length, 0) // 64
    at = low + tl.zeros_like(position)  # [rows]
    low_mask = tl.load(bitmask_base + at, mask=at < MASK_SIZE, other=0)
    high_mask = tl.load(bitmask_base + at + 1, mask=at + 1 < MASK_SIZE, other=0)
    mask = tl.where((index // 64 == low)[None, :], low_mask[:, None], high_mask[:, None])
    ancestor = ((mask >> (index % 64).to(tl.int64)[None, :]) & 1) != 0
    visible = (inner < 0)[None, :] | (ancestor & (inner < nodes)[None, :])
    if HAS_WINDOW:
        key_depth = tl.load(depth_base + index, mask=index < nodes, other=0).to(tl.int32)
        key_position = tl.where(inner < 0, columns, length + key_depth)
        visible = visible & (key_position[None, :] > position[:, None] - window)
    return visible


@triton.jit
def _attend_block(q, key_base, value_base, column, k_row, v_row, row_max, total, row_sum, acc, scale, softcap,  # type: ignore[no-untyped-def]
                  bitmask_base, depth_base, position, length, nodes, window,
                  MASK_SIZE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
                  MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one block of keys and values to the running maximum, sum and weighted values (one online-softmax step)."""
    columns = column + tl.arange(0, COLUMNS)
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_at = key_base + columns[None, :] * k_row + d[:, None]
    v_at = value_base + columns[:, None] * v_row + v[None, :]
    if MASKED:  # columns after the tree are stale and may hold anything, NaN included
        inside = columns < total
        k = tl.load(k_at, mask=inside[None, :] & (d < DIM)[:, None], other=0.0)
        values = tl.load(v_at, mask=inside[:, None] & (v < VALUE_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at) if DIM == BLOCK_D else tl.load(k_at, mask=(d < DIM)[:, None], other=0.0)
        values = tl.load(v_at) if VALUE_DIM == BLOCK_V else tl.load(v_at, mask=(v < VALUE_DIM)[None, :], other=0.0)
    scores = capped(dot(q, k, PRECISION) * scale, softcap, HAS_CAP)
    if MASKED:
        visible = _visible(
            bitmask_base, depth_base, position, columns, column, length, nodes, window, MASK_SIZE, HAS_WINDOW)  # fmt: skip
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a node may see no key of this block
    weights = tl.exp2(scores - safe_max[:, None])
    rescale = tl.exp2(row_max - safe_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + dot(weights.to(values.dtype), values, PRECISION)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["nodes", "splits", "window"])
def split_kernel(query, key, value, bitmask, depth, lengths, partial, lse, scale, softcap, window, nodes, splits,  # type: ignore[no-untyped-def]
                 kv_heads, q_batch, q_head, q_node, k_batch, k_head, k_row, v_batch, v_head, v_row,
                 m_batch, m_node, d_batch,
                 GROUP: tl.constexpr, MASK_SIZE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Grid (query tiles, splits, batch * kv_heads): process one tile of rows (node, head of the group) over one split."""
    tile, split, batch_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (batch_head // kv_heads).to(tl.int64), (batch_head % kv_heads).to(tl.int64)
    length = tl.load(lengths + batch).to(tl.int32)
    total = length + nodes
    first = length * 0
    if HAS_WINDOW:  # no node sees a column before `first`
        first = tl.maximum(length + 1 - window, 0) // COLUMNS * COLUMNS
    share = tl.cdiv(tl.cdiv(total - first, COLUMNS), splits) * COLUMNS
    begin = first + split * share
    end = tl.minimum(begin + share, total)

    rows = tile * ROWS + tl.arange(0, ROWS)
    used = tl.minimum(rows, nodes * GROUP - 1)  # surplus rows repeat the last one and are not stored
    node, group_head = used // GROUP, used % GROUP
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_at = query + batch * q_batch + (head * GROUP + group_head)[:, None] * q_head + node[:, None] * q_node + d[None, :]
    q = tl.load(q_at) if DIM == BLOCK_D else tl.load(q_at, mask=(d < DIM)[None, :], other=0.0)
    key_base = key + batch * k_batch + head * k_head
    value_base = value + batch * v_batch + head * v_head
    bitmask_base = bitmask + batch * m_batch + node * m_node
    depth_base = depth + batch * d_batch
    position = length + tl.load(depth_base + node).to(tl.int32)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    unmasked_end = begin  # columns before it need no mask
    if not HAS_WINDOW:
        unmasked_end = begin + tl.maximum(tl.minimum(length, end) - begin, 0) // COLUMNS * COLUMNS
    for column in range(begin, unmasked_end, COLUMNS):
        row_max, row_sum, acc = _attend_block(
            q, key_base, value_base, column, k_row, v_row, row_max, total, row_sum, acc, scale, softcap,
            bitmask_base, depth_base, position, length, nodes, window,
            MASK_SIZE, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, COLUMNS, HAS_CAP, HAS_WINDOW, False, PRECISION)  # fmt: skip
    for column in range(unmasked_end, end, COLUMNS):
        row_max, row_sum, acc = _attend_block(
            q, key_base, value_base, column, k_row, v_row, row_max, total, row_sum, acc, scale, softcap,
            bitmask_base, depth_base, position, length, nodes, window,
            MASK_SIZE, DIM, VALUE_DIM, BLOCK_D, BLOCK_V, COLUMNS, HAS_CAP, HAS_WINDOW, True, PRECISION)  # fmt: skip

    nonempty = row_sum > 0
    place = (batch_head.to(tl.int64) * splits + split) * (nodes * GROUP) + rows
    inside = rows < nodes * GROUP
    safe_sum = tl.where(nonempty, row_sum, 1.0)
    tl.store(lse + place, tl.where(nonempty, row_max + tl.log2(safe_sum), float("-inf")), mask=inside)
    tl.store(partial + place[:, None] * VALUE_DIM + v[None, :], acc / safe_sum[:, None],
             mask=inside[:, None] & (v < VALUE_DIM)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["nodes", "splits"])
def merge_kernel(partial, lse, sinks, out, nodes, splits, kv_heads,  # type: ignore[no-untyped-def]
                 GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
                 HAS_SINKS: tl.constexpr):  # fmt: skip
    """Grid (nodes * group, batch * kv_heads): merge all splits of a row at once, into `[batch, nodes, heads, dim]`."""
    row, batch_head = tl.program_id(0), tl.program_id(1)
    batch, head = (batch_head // kv_heads).to(tl.int64), batch_head % kv_heads
    split, v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    inside, columns = split < splits, v < VALUE_DIM
    place = (batch_head.to(tl.int64) * splits + split) * (nodes * GROUP) + row
    sizes = tl.load(lse + place, mask=inside, other=float("-inf"))
    parts = tl.load(
        partial + place[:, None] * VALUE_DIM + v[None, :], mask=inside[:, None] & columns[None, :], other=0.0
    )
    row_max = tl.max(sizes, 0)  # a node sees itself, so one split has a number
    if HAS_SINKS:  # a score that takes part in the softmax and carries no value
        sink = tl.load(sinks + head * GROUP + row % GROUP).to(tl.float32) * LOG2_E
        row_max = tl.maximum(row_max, sink)
    weights = tl.exp2(sizes - row_max)
    row_sum = tl.sum(weights, 0)
    if HAS_SINKS:
        row_sum = row_sum + tl.exp2(sink - row_max)
    result = tl.sum(parts * weights[:, None], 0) / row_sum
    target = (batch * nodes + row // GROUP) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    tl.store(out + target * VALUE_DIM + v, result.to(out.dtype.element_ty), mask=columns)


class Tile(NamedTuple):
    """Size of a block, rows (node and head) by columns (keys), with its number of warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def splits_for(programs: int, max_splits: int, slots: int) -> int:
    """Return the number of pieces of the keys with which the multiprocessors are busy in whole rounds.

    Args:
        programs: number of programs that every piece has.
        max_splits: largest number of pieces.
        slots: programs that run at a time.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(programs * splits, slots) / splits + _SPLIT_COST * splits

    return min(range(1, max(1, min(max_splits, MAX_SPLITS)) + 1), key=cost)


def shared_bytes(tile: Tile, dim: int, value_dim: int, itemsize: int) -> int:
    """Return about how much shared memory a program of this block takes: queries, and the stages of keys and values."""
    block, value_block = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    return itemsize * (tile.rows * block + tile.stages * tile.columns * (block + value_block))


def tile_for(rows: int, dim: int, dtype: torch.dtype, large_smem: bool = True) -> Tile:
    """Return the block size for `rows` (nodes times query heads of a group) of the larger of head size and value size.

    With `large_smem` the device gives a block 163 KiB of shared memory (A100, H100), else 99 KiB.
    """
    max_rows, wide = 128 if large_smem else 64, triton.next_power_of_2(dim) > 128
    block = max(16, min(triton.next_power_of_2(rows), max_rows))
    if dtype == torch.float32:
        return Tile(min(block, 16 if wide else 32), 16 if wide else 32, 4, 2)
    return Tile(block, 32 if wide else 64, 8 if block > 64 else 4, 3 if large_smem and not wide else 2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, tree: TreeMetadata, params: AttnParams, splits: int | None = None
) -> Tensor:
    """Compute attention of every node over its row's committed prefix and its own ancestors.

    Shapes are those of `Backend`, with at most 256 nodes and `length + nodes <= columns`; columns after a row's nodes are
    not read. `splits` is the number of pieces of the keys; None derives it from shapes and device.
    """
    batch, heads, nodes, dim = query.shape
    kv_heads, columns, value_dim = key.shape[1], key.shape[2], value.shape[3]
    assert key.stride(3) == value.stride(3) == 1, "keys and values must be contiguous along a head"
    query = query if query.stride(3) == 1 else query.contiguous()
    bitmask, depth, window = tree.ancestor_bitmask.contiguous(), tree.depth.contiguous(), params.window
    rows, batch_heads = nodes * (heads // kv_heads), batch * kv_heads
    sm_count, shared = _device_limits(query.device)
    tile = tile_for(rows, max(dim, value_dim), query.dtype, shared >= 163 * 1024)
    tiles = triton.cdiv(rows, tile.rows)
    if splits is None:  # each split has at least two blocks of columns
        together = max(1, shared // shared_bytes(tile, dim, value_dim, query.itemsize))
        splits = splits_for(batch_heads * tiles, columns // (2 * tile.columns), sm_count * together)
    assert splits <= MAX_SPLITS, f"at most {MAX_SPLITS} splits, got {splits}"
    partial = query.new_empty(batch_heads, splits, rows, value_dim, dtype=torch.float32)
    lse = query.new_empty(batch_heads, splits, rows, dtype=torch.float32)
    out = query.new_empty(batch, nodes, heads, value_dim)
    split_kernel[tiles, splits, batch_heads](
        query, key, value, bitmask, depth, tree.lengths, partial, lse,
        params.scale * (1.0 if params.softcap else LOG2_E.value), params.softcap or 0.0, window or 0, nodes, splits, kv_heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        bitmask.stride(0) if bitmask.shape[0] > 1 else 0, bitmask.stride(1), depth.stride(0) if depth.shape[0] > 1 else 0,
        **split_constants(tile, heads // kv_heads, bitmask.shape[2], dim, value_dim, query.dtype, params.softcap, window),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    merge_kernel[rows, batch_heads](
        partial, lse, params.sinks, out, nodes, splits, kv_heads,
        **merge_constants(heads // kv_heads, value_dim, splits, params.sinks is not None), num_warps=4,
    )  # fmt: skip
    return out


def split_constants(
    tile: Tile, group: int, mask_size: int, dim: int, value_dim: int, dtype: torch.dtype, softcap: Any, window: Any
) -> dict[str, Any]:
    """Return the compile-time values of `split_kernel`."""
    return {
        "GROUP": group, "MASK_SIZE": mask_size, "DIM": dim, "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        "ROWS": tile.rows, "COLUMNS": tile.columns, "HAS_CAP": softcap is not None, "HAS_WINDOW": window is not None,
        "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def merge_constants(group: int, value_dim: int, splits: int, has_sinks: bool) -> dict[str, Any]:
    """Return the compile-time values of `merge_kernel`."""
    blocks = {"BLOCK_V": triton.next_power_of_2(value_dim), "BLOCK_S": triton.next_power_of_2(splits)}
    return {"GROUP": group, "VALUE_DIM": value_dim, **blocks, "HAS_SINKS": has_sinks}


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported, so kernels run on the CPU, slowly."""
    return not isinstance(split_kernel, triton.JITFunction)


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of products: never TF32 for float32; without effect for bfloat16 and float16 on a GPU."""
    return "cast" if dtype == torch.bfloat16 and is_interpreted() else "ieee"


@lru_cache(maxsize=16)
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the bytes of shared memory that a block may use."""
    if device.type != "cuda":
        return 1, 99 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]
