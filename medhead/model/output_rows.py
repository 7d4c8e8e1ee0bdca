"""The rows of a model's output matrix as an ordinary tensor, whatever module holds them.

Quantised, sharded and offloaded modules store something else than `[vocab, hidden]` numbers, or store them elsewhere. All of
them map hidden states to logits, so the rows are read from the logits of unit vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from medhead.model.block_weights import BlockLinear

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 64  # unit vectors multiplied at once


@torch.no_grad()
def output_form(model: Any, output: Any, device: torch.device) -> tuple[int, int, torch.dtype]:
    """Return the size of the vocabulary, the size of a hidden state, and the type that the output matrix computes in."""
    weight: Any = getattr(output, "weight", None)
    if _is_whole(weight, model):
        return weight.shape[0], weight.shape[1], weight.dtype
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in _DTYPES else model.dtype
    size = getattr(output, "in_features", None) or model.config.get_text_config(decoder=True).hidden_size
    logits = output(torch.zeros(1, size, dtype=dtype, device=device))
    return logits.shape[-1], size, dtype


@torch.no_grad()
def output_rows(target: Any, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the rows `[tokens, hidden]` of a `Target`'s output matrix and their bias `[tokens]`, or None without one.

    `tokens` are token ids; None is the whole vocabulary. Weights that are no plain tensor are dequantised.
    """
    weight: Any = getattr(target.output, "weight", None)
    bias = getattr(target.output, "bias", None)
    if isinstance(target.output, BlockLinear):
        return target.output.rows(tokens), bias if bias is None or tokens is None else bias[tokens]
    if not _is_whole(weight, target.model):
        return _measured_rows(target, tokens)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if tokens is None:
        return weight, bias
    return weight[tokens], None if bias is None else bias[tokens]


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor of a type that models compute in."""
    return type(weight) in (Tensor, nn.Parameter, FakeTensor) and weight.dtype in _DTYPES


def _is_whole(weight: Any, model: Any) -> bool:
    """Whether a weight is plain, in memory, and no shard of a larger one."""
    return is_plain(weight) and weight.device.type != "meta" and (getattr(model, "tp_size", None) or 1) == 1


def _measured_rows(target: Any, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    unit = torch.eye(target.hidden_size, dtype=target.dtype, device=target.device)
    tokens = torch.arange(target.vocab_size, device=target.device) if tokens is None else tokens
    bias = target.output(torch.zeros_like(unit[:1])).to(target.device)[0, tokens]
    columns = [target.output(part).to(target.device)[:, tokens] - bias for part in unit.split(_CHUNK)]
    return torch.cat(columns).t().contiguous(), bias if bias.any() else None
