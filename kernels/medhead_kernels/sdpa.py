"""Tree attention by PyTorch's scaled_dot_product_attention with a dense bias; the default on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute masked attention; shapes as in `reference.attention`. Several queries without a bias are causal."""
    causal = bias is None and query.shape[2] > 1
    grouped = bool(query.shape[1] != key.shape[1])
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
