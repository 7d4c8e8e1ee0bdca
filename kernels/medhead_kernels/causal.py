"""Attention of the newest tokens of a text to all of its tokens, by flash kernels: how prompts are read on a GPU.

Every new token sees the whole prefix, so that part needs no mask; the new tokens among themselves are causal. The two results
are merged by log-sum-exp (see `flash`). PyTorch's own choice may be cuDNN, which builds a plan for every new number of keys
(tens of milliseconds), or a dense mask of tokens by keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_DTYPES = (torch.bfloat16, torch.float16)


def is_supported(query: Tensor, value: Tensor) -> bool:
    """Return whether PyTorch's flash kernel for CUDA serves these tensors."""
    dim = query.shape[3]
    return query.device.type == "cuda" and query.dtype in HALF_DTYPES and dim == value.shape[3] <= 256 and dim % 8 == 0


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Map queries `[batch, heads, tokens, dim]` to `[batch, tokens, heads, dim]`.

    Keys and values are `[batch, kv_heads, columns, dim]`; their last `tokens` columns are those of the queries.
    """
    tokens = query.shape[2]
    start = key.shape[2] - tokens
    if tokens == 1:
        return flash_kernel(query, key, value, scale)[0].transpose(1, 2)
    out, lse = flash_kernel(query, key[:, :, start:], value[:, :, start:], scale, causal=True)
    if start > 0:
        prefix_out, prefix_lse = flash_kernel(query, key[:, :, :start], value[:, :, :start], scale)
        share = torch.sigmoid(prefix_lse - lse)[..., None]  # of the prefix in the softmax's denominator
        out = torch.lerp(out.float(), prefix_out.float(), share).to(query.dtype)
    return out.transpose(1, 2)


def flash_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Call PyTorch's flash kernel; return `[batch, heads, tokens, dim]` and the log-sum-exp `[batch, heads, tokens]`."""
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if query.device.type == "cpu" else "")
    out, lse = getattr(torch.ops.aten, name)(query, key, value, 0.0, causal, scale=scale)[:2]
    return out, lse[:, :, : query.shape[2]]
