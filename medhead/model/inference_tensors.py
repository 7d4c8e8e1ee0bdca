"""Ordinary tensors in place of those that a model made and kept while it ran in inference mode.

Passes run in inference mode, which is faster. Autograd and in-place changes refuse the tensors that were made there. Some
models keep tensors in `forward`, such as the frequencies of a dynamic RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def replace_inference_tensors(model: nn.Module) -> None:
    """Replace the buffers and the tensor attributes of all modules that are inference tensors by ordinary copies."""
    for module in model.modules():
        _replace(module._buffers)
        _replace(module.__dict__)


def _replace(values: dict[str, Any]) -> None:
    found = [name for name, value in list(values.items()) if isinstance(value, Tensor) and value.is_inference()]
    if found:
        with torch.inference_mode(False), torch.no_grad():
            values.update({name: values[name].clone() for name in found})
