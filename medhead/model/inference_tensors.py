"""Ordinary tensors in place of those that a model made and kept while it ran in inference mode.

Passes run in inference mode, which is faster. Autograd and in-place changes refuse the tensors that were made there. Some
models keep tensors in `forward`, such as the frequencies of a dynamic RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FIXED = frozenset(nn.Module().__dict__)  # attributes of every module, which hold no tensors themselves


def replace_inference_tensors(model: nn.Module) -> None:
    """Replace the buffers and the tensor attributes of all modules that are inference tensors by ordinary copies."""
    for module in model.modules():
        _replace(module._buffers, list(module._buffers))
        _replace(module.__dict__, list(module.__dict__.keys() - _FIXED))


def _replace(values: dict[str, Any], names: list[str]) -> None:
    found = [name for name in names if isinstance(values[name], Tensor) and values[name].is_inference()]
    if found:
        with torch.inference_mode(False), torch.no_grad():
            values.update({name: values[name].clone() for name in found})
