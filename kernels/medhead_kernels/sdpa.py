"""Tree attention by PyTorch's scaled_dot_product_attention with a dense bias; the default on a CPU."""

from __future__ import annotations

from threading import Lock

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from medhead_kernels import causal

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_flags = Lock()  # the choice of kernels is the process's


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute masked attention; shapes as in `reference.attention`. Several queries without a bias are causal.

    Without a bias there are as many keys as queries, or one query, or `causal.is_supported`. On CUDA cuDNN is not used, see
    `causal`.
    """
    if bias is None and causal.is_supported(query, value):
        return causal.attention(query, key, value, scale)
    is_causal = bias is None and query.shape[2] > 1
    grouped = bool(query.shape[1] != key.shape[1])  # sizes of a traced pass are symbols
    if query.device.type != "cuda":
        out = F.scaled_dot_product_attention(
            query, key, value, bias, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    if grouped:  # no other kernel takes a mask and groups of query heads
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    with _flags, sdpa_kernel(_WITHOUT_CUDNN):
        out = F.scaled_dot_product_attention(query, key, value, bias, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2)
