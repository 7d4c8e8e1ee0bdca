"""Products of a few rows with a weight matrix on a CPU: the nodes of a tree are such rows.

BLAS libraries are made for one row (a matrix-vector product) and for many. For the 2 to 64 rows of a tree, `x W^T` often
spends most of its time bringing the weight matrix into another layout; `W x^T` reads the matrix where it lies. Same
numbers up to rounding; which is faster is a matter of the machine and its library, so it is measured, once a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 64
_GAIN = 0.85  # share of the usual time that counts as faster


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in the order that is faster for the number of rows.

    Args:
        x: `[..., size]`.
        weight: `[out, size]`.
        bias: `[out]`, or None.

    Returns:
        `[..., out]`, contiguous.
    """
    rows = x.numel() // x.shape[-1]
    if not 1 < rows <= MOST_ROWS or x.dtype != torch.float32 or x.device.type != "cpu" or not turning_helps():
        return F.linear(x, weight, bias)
    return turned(x, weight, bias)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as `(W x^T)^T`."""
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()
    if bias is not None:
        out = out + bias
    return out.contiguous().view(*x.shape[:-1], weight.shape[0])


@lru_cache(maxsize=1)
def turning_helps(rows: int = 16, size: int = 256, out: int = 1024, matrices: int = 24, repeats: int = 5) -> bool:
    """Whether `W x^T` is clearly faster here, over more matrices than the caches hold; takes some 20 ms."""
    with torch.inference_mode():
        x, weights = torch.ones(rows, size), [torch.ones(out, size) for _ in range(matrices)]

        def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                for weight in weights:
                    product(x, weight)
                times.append(time.perf_counter() - began)
            return min(times)

        return seconds(turned) < _GAIN * seconds(F.linear)
