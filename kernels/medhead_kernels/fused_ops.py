"""The fused kernels as PyTorch operators, which traced and compiled steps can record."""

from __future__ import annotations

import torch
from torch import Tensor

from medhead_kernels import act_mul as act_mul_kernels
from medhead_kernels import add_rms_norm as norm_kernels
from medhead_kernels import rope_write as rope_kernels


@torch.library.custom_op("medhead::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    """See `add_rms_norm.rms_norm`."""
    return norm_kernels.rms_norm(x, weight, eps, offset)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("medhead::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm.add_rms_norm`."""
    return norm_kernels.add_rms_norm(x, residual, weight, eps, offset)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


@torch.library.custom_op("medhead::act_mul", mutates_args=())
def act_mul(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `act_mul.act_mul`."""
    return act_mul_kernels.act_mul(gate, up, kind)


@act_mul.register_fake
def _(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("medhead::rope_write", mutates_args=("query", "keys", "values"))
def rope_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    """See `rope_write.rope_write`."""
    rope_kernels.rope_write(query, key, value, cos, sin, rows, keys, values)


@rope_write.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> None:
    return None
