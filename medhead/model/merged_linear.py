"""Linear layers of one input as one product: their weights follow each other in memory, so nothing is held twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_merge(layers: Sequence[nn.Linear]) -> bool:
    """Return whether layers have ordinary weights of one kind, all with a bias or all without."""
    first = layers[0]
    return all(
        type(weight) is nn.Parameter
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and not weight.is_inference()
        and (weight.device, weight.dtype, weight.shape[1])
        == (first.weight.device, first.weight.dtype, first.in_features)
        and (layer.bias is None) == (first.bias is None)
        for layer in layers
        for weight in [layer._parameters.get("weight")]
    )


class MergedLinear:
    """Several layers whose first computes the outputs of all, which the others hand out.

    From the first `refresh` on the parameters are views of one tensor, with the same values. So a `state_dict` made before no
    longer shares their memory, `save_pretrained` copies them, and the memory is free only when the last of them was replaced.

    Attributes:
        layers: the layers.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._outputs: Sequence[Tensor] = ()
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def refresh(self) -> None:
        """Get ready; move weights that do not follow each other: at first, and after they were moved or replaced."""
        self._weight = _joined([layer.weight for layer in self.layers])
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self._bias = _joined(biases) if biases else None

    def release(self) -> None:
        """Hold no memory until the next `refresh`."""
        self._weight = self._bias = self._input = None
        self._outputs = ()

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """Return what replaces the layers' forwards."""
        return {layer: partial(self._forward, place) for place, layer in enumerate(self.layers)}

    def _forward(self, place: int, x: Tensor) -> Tensor:
        if place == 0:
            assert self._weight is not None, "refresh was called"
            self._input, self._outputs = x, F.linear(x, self._weight, self._bias).split(self._sizes, -1)
        elif self._input is not x:
            layer = self.layers[place]
            return F.linear(x, layer.weight, layer.bias)
        out = self._outputs[place]
        if place == len(self.layers) - 1:
            self._input, self._outputs = None, ()
        return out


@torch.inference_mode(False)  # else the parameters would become inference tensors there
@torch.no_grad()
def _joined(weights: list[Any]) -> Tensor:
    """Return weights one after the other as one tensor, of which they become parts unless they are already."""
    first, at = weights[0], weights[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for weight in weights:
        if weight.data_ptr() != at or weight.untyped_storage().data_ptr() != storage:
            break
        at += weight.nbytes
    else:
        rows = sum(len(weight) for weight in weights)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return joined
