"""Residual addition and root-mean-square norm of whole rows in one launch (Triton), with a plain PyTorch reference.

One program computes one row in one order, so a row's result does not depend on the number of rows: plain decoding and passes over
trees get the same bits. PyTorch sums a row in another order, so its own norm differs in the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, total, eps, inner, x_outer, x_inner,  # type: ignore[no-untyped-def]
                        SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Grid (rows,): normalise one row; with a residual, contiguous like the results, store the sum as well."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    value = tl.load(x + row // inner * x_outer + row % inner * x_inner + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32) + value.to(tl.float32)
        value = added.to(value.dtype)
        tl.store(total + row * SIZE + columns, value, mask=inside)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:  # Gemma rounds once, after the factor of 1 + weight
        normed = normed * (1.0 + factor)
    else:
        normed = normed.to(value.dtype).to(tl.float32) * factor
    tl.store(out + row * SIZE + columns, normed.to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """Return the norm of the last dimension of `x` `[..., size]`, times `weight` `[size]`, or 1 + weight with `offset`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, out, None, eps, offset)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """Return the norm of `residual + x`, as `rms_norm`, and that sum, each `[..., size]`."""
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    _launch(x, residual, weight, out, total, eps, offset)
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float, offset: bool
) -> None:
    rows = x.reshape(-1, x.shape[-2], x.shape[-1])  # a view of what linear layers return, heads of merged ones too
    assert x.stride(-1) == 1, "a row must be contiguous"
    assert residual is None or (residual.is_contiguous() and residual.shape == x.shape), "the residual is not like x"
    with torch.cuda.device_of(x):
        add_rms_norm_kernel[(rows.shape[0] * rows.shape[1],)](
            rows, residual, weight, out, total, eps, rows.shape[1], rows.stride(0), rows.stride(1),
            **constants(x.shape[-1], residual is not None, offset), num_warps=warps(x.shape[-1]),
        )  # fmt: skip


def constants(size: int, has_residual: bool, offset: bool) -> dict[str, Any]:
    """Return the compile-time values of the kernel."""
    return {"SIZE": size, "BLOCK": triton.next_power_of_2(size), "HAS_RESIDUAL": has_residual, "OFFSET": offset}


def warps(size: int) -> int:
    """Return the number of warps for a row: 8 elements or more for every thread."""
    return min(16, max(1, triton.next_power_of_2(size) // 256))


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """Return norm and sum by plain PyTorch, rounded where Llama's and Gemma's modules round."""
    total = x if residual is None else residual + x
    normed = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + eps)
    out = normed * (1.0 + weight.float()) if offset else weight * normed.to(x.dtype)
    return out.to(x.dtype), total
