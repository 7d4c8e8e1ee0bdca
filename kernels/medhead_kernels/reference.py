"""Attention in plain PyTorch with every option; all other backends are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float,
              softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """Compute masked attention with a float32 softmax; shapes as in `Backend`, options as in `AttnParams`.

    `bias` `[batch, 1 or heads, nodes, keys]` is added to the scores; the lowest number of its dtype hides a key.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    if sinks is not None:
        extra = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2)
