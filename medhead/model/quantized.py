"""Refusal of layers that quantise activations so that a token tree would change the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medhead.errors import UnsupportedTargetError
from medhead.model.eval_mode import eval_mode
from medhead.model.output_rows import is_plain
from medhead.model.probe import HALF_TOLERANCE, TOLERANCE

_LARGE = 100.0  # factor of the second row's activations, which dominates a scale that both rows share


@torch.no_grad()
def check_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Run one layer of every kind that stores something else than plain floating-point weights.

    Raises:
        UnsupportedTargetError: the layer's result for a token depends on the other tokens of the pass, as where activations
            are quantised with one scale for all; or the layer rounds the activations of a float32 model to a few bits. A tree
            and a plain pass differ by 1e-7 before such a layer, and by a rounding step after it, which changes texts.
    """
    seen = set()
    for name, layer in model.named_modules():
        weight, size = getattr(layer, "weight", None), getattr(layer, "in_features", None)
        kind = type(layer), type(weight), size
        if not isinstance(size, int) or not _is_quantized(weight) or kind in seen:
            continue
        seen.add(kind)
        with eval_mode(layer):
            reason = _reason(layer, size, dtype)
        if reason is not None:
            stored = type(layer if type(weight) is nn.Parameter or not isinstance(weight, Tensor) else weight).__name__
            raise UnsupportedTargetError(
                f"{type(model).__name__} cannot verify a token tree exactly: its layer {name} ({stored}) {reason}"
            )


def _is_quantized(weight: Any) -> bool:
    """Whether a layer's weight is no ordinary tensor of floating-point numbers, nor shards of one."""
    if not isinstance(weight, Tensor):
        return True
    sharded = type(weight).__module__.startswith("torch.distributed")
    return not (sharded or is_plain(weight))


def _reason(layer: Any, size: int, dtype: torch.dtype) -> str | None:
    """Return why the layer cannot be exact, None if it can."""
    held = next((tensor for tensor in (*layer.parameters(), *layer.buffers())), torch.empty(0))
    if held.device.type == "meta":  # offloaded; the probe decides
        return None
    rows = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(held.device, dtype)
    try:
        alone, beside = layer(rows[:1]), layer(rows * torch.tensor([[1.0], [_LARGE]]).to(rows))[:1]
        parts = layer(rows[1:]) + alone - layer(torch.zeros_like(rows[:1]))
        whole = layer(rows[:1] + rows[1:])
    except Exception:  # it takes other arguments; the probe decides
        return None
    allowed = TOLERANCE.get(dtype, HALF_TOLERANCE) * float(alone.abs().max())
    if not float((alone - beside).abs().max()) <= allowed:
        return (
            "quantises the activations of all tokens of a pass together, so that a tree changes the text; quantise the "
            "weights alone, or the activations of every token on their own"
        )
    is_linear = isinstance(layer, nn.Linear) or not layer._modules  # others may hold an activation function
    if is_linear and not float((parts - whole).abs().max()) <= allowed:
        return (
            f"rounds activations to a few bits, which {str(dtype).removeprefix('torch.')} does not; quantise the weights "
            "alone, or load the model in bfloat16, where trees may round near ties differently"
        )
    return None
