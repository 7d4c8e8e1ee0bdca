"""Keeping the accepted path of every row: the rows of all layers move in one launch, in place, in Triton.

A path goes downwards (`path[d] >= d`), so a row is read before anything is written over it when the steps of one
(layer, batch row, head) are done in increasing order. One program does all steps of one such slot; nothing is copied aside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["steps"])
def move_kernel(store, path, lengths, counts, steps, batch, heads, s_slot, s_batch, s_head, s_row, p_batch,
                DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_COUNTS: tl.constexpr):  # fmt: skip
    """Grid (slots * batch * heads,): row `length + path[d]` goes to `length + d`, for d = 0, 1, ... in this order."""
    program = tl.program_id(0)
    row, slot = (program // heads) % batch, (program // heads // batch).to(tl.int64)
    base = store + slot * s_slot + row.to(tl.int64) * s_batch + (program % heads).to(tl.int64) * s_head
    length = tl.load(lengths + row).to(tl.int64)
    last = steps
    if HAS_COUNTS:
        last = tl.minimum(tl.load(counts + row).to(tl.int32), steps)
    d = tl.arange(0, BLOCK)
    for step in range(last):
        node = tl.load(path + row * p_batch + step)
        if node != step:  # else it is in its place
            kept = tl.load(base + (length + node) * s_row + d, mask=d < DIM, other=0.0)
            tl.store(base + (length + step) * s_row + d, kept, mask=d < DIM)


def move(store: Tensor, path: Tensor, lengths: Tensor, counts: Tensor | None = None) -> None:
    """Copy the rows `length + path[d]` of a store to `length + d`, in place.

    Args:
        store: `[slots, batch, heads, tokens, dim]`: keys or values of all layers of one shape.
        path: `[batch, steps]` int64, the node that goes to each place, starting with node 0; along the part that counts
            it increases, as a path from the root does.
        lengths: `[batch]` int, committed tokens of every row, on the device.
        counts: `[batch]` int, how many steps of each row count; None moves all of them (what lies behind a row's accepted
            nodes is free, so moving it does no harm).
    """
    slots, batch, heads, _, dim = store.shape
    assert store.stride(4) == 1, "a store must be contiguous along a head"
    path = path.contiguous()
    with torch.cuda.device_of(store):
        move_kernel[(slots * batch * heads,)](
            store, path, lengths, counts, path.shape[1], batch, heads, *store.stride()[:4], path.stride(0),
            **move_constants(dim, counts is not None), num_warps=1 if dim <= 128 else 2, num_stages=1,
        )  # fmt: skip


def move_constants(dim: int, has_counts: bool) -> dict[str, Any]:
    """Compile-time values of `move_kernel`."""
    return {"DIM": dim, "BLOCK": triton.next_power_of_2(dim), "HAS_COUNTS": has_counts}
