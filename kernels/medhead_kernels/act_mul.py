"""Activation of a gate times another product in one launch (Triton), with a plain PyTorch reference.

Every element is computed on its own, so results do not depend on the number of rows. The activation is rounded before the
product, as PyTorch does; its exponential is Triton's, so float32 results may differ from PyTorch's in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@triton.jit
def act_mul_kernel(gate, up, out, g_row, u_row, size, BLOCK: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (rows, blocks of columns): compute `activation(gate) * up`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    value = tl.load(gate + row * g_row + columns, mask=inside, other=0.0)
    x = value.to(tl.float32)
    if KIND == "silu":
        found = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu_tanh":  # tanh(y) is 1 - 2 / (exp(2y) + 1)
        twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        found = 0.5 * x * (2.0 - 2.0 / (tl.exp(twice) + 1.0))
    else:
        found = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    other = tl.load(up + row * u_row + columns, mask=inside, other=0.0)
    product = found.to(value.dtype).to(tl.float32) * other.to(tl.float32)
    tl.store(out + row * size + columns, product.to(value.dtype), mask=inside)


def act_mul(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return `activation(gate) * up`, each `[..., size]` with contiguous rows; `kind` is one of `ACTIVATIONS`."""
    assert gate.stride(-1) == up.stride(-1) == 1, "a row must be contiguous"
    out, size = torch.empty_like(gate, memory_format=torch.contiguous_format), gate.shape[-1]
    gates, ups = gate.reshape(-1, size), up.reshape(-1, size)  # views of what one linear layer returns
    with torch.cuda.device_of(gate):
        act_mul_kernel[len(gates), triton.cdiv(size, BLOCK)](
            gates, ups, out, gates.stride(0), ups.stride(0), size, **constants(kind), num_warps=4
        )
    return out


def constants(kind: str) -> dict[str, Any]:
    """Return the compile-time values of the kernel."""
    return {"BLOCK": BLOCK, "KIND": kind}


def reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return the same by plain PyTorch."""
    activated = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return activated * up
