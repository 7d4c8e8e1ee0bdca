"""Commit of the accepted path of every row: one Triton launch moves the cache rows of all layers in place.

A path increases (`path[d] >= d`), so one program that copies the rows of one (layer, batch row, head) in increasing order
of d reads each row before it is overwritten, and no scratch buffer is needed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["steps"])
def move_kernel(buffer, path, lengths, counts, steps, batch, heads, s_slot, s_batch, s_head, s_row, p_batch,  # type: ignore[no-untyped-def]
                DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_COUNTS: tl.constexpr):  # fmt: skip
    """Grid (slots * batch * heads,): copy row `length + path[d]` to `length + d` for d = 0, 1, ... in this order."""
    program = tl.program_id(0)
    row, slot = (program // heads) % batch, (program // heads // batch).to(tl.int64)
    base = buffer + slot * s_slot + row.to(tl.int64) * s_batch + (program % heads).to(tl.int64) * s_head
    length = tl.load(lengths + row).to(tl.int64)
    last = steps
    if HAS_COUNTS:
        last = tl.minimum(tl.load(counts + row).to(tl.int32), steps)
    d = tl.arange(0, BLOCK)
    for step in range(last):
        node = tl.load(path + row * p_batch + step)
        if node != step:  # otherwise the row is in its place already
            kept = tl.load(base + (length + node) * s_row + d, mask=d < DIM, other=0.0)
            tl.store(base + (length + step) * s_row + d, kept, mask=d < DIM)


def move(buffer: Tensor, path: Tensor, lengths: Tensor, counts: Tensor | None = None) -> None:
    """Copy the rows `length + path[d]` of a cache buffer `[slots, batch, heads, tokens, dim]` to `length + d`, in place.

    `path` `[batch, steps]` int64 is the node to keep at each depth, starting with node 0; it increases for the first `counts`
    `[batch]` steps, which are copied. None copies all: rows after the accepted nodes are free. `lengths` is `[batch]`.
    """
    slots, batch, heads, _, dim = buffer.shape
    assert buffer.stride(4) == 1, "a cache buffer must be contiguous along a head"
    path = path.contiguous()
    with torch.cuda.device_of(buffer):
        move_kernel[(slots * batch * heads,)](
            buffer, path, lengths, counts, path.shape[1], batch, heads, *buffer.stride()[:4], path.stride(0),
            **move_constants(dim, counts is not None), num_warps=1 if dim <= 128 else 2, num_stages=1,
        )  # fmt: skip


def move_constants(dim: int, has_counts: bool) -> dict[str, Any]:
    """Return the compile-time values of `move_kernel`."""
    return {"DIM": dim, "BLOCK": triton.next_power_of_2(dim), "HAS_COUNTS": has_counts}
