"""Identity of a model's current weights and adapters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from medhead.model.target import Target

_SAMPLES = 64  # values of a weight that are compared


def model_state(target: Target) -> Hashable:
    """Return a key that changes with the model: its modules, hooks, adapters and weights. It invalidates captured steps.

    A compiled step on a CPU holds packed copies of the weights, so there the key also has the weights' version counters and a
    sample of their values, because PyTorch does not count changes through `weight.data`. Elsewhere steps read weights in place.
    """
    weights = [part for weight in target.model.parameters() for part in parts(weight)]
    on_cpu = [weight.detach() for weight in weights if weight.device.type == "cpu"]
    versions = tuple(0 if weight.is_inference() else weight._version for weight in on_cpu)
    return tuple(map(_module_key, target.model.modules())), tuple(map(_pointer, weights)), versions, sample(on_cpu)


def weights_state(target: Target) -> Hashable:
    """Return a key that changes with the model's outputs: `model_state`, and the version counters of weights on any device."""
    weights = [part for weight in target.model.parameters() for part in parts(weight)]
    return model_state(target), tuple(0 if weight.is_inference() else weight._version for weight in weights)


def _module_key(module: nn.Module) -> Hashable:
    kind, forward = type(module), module.__dict__.get("forward")
    hooks = (forward, *module._forward_pre_hooks.values(), *module._forward_hooks.values())
    key = kind, *(getattr(hook, "__qualname__", type(hook)) for hook in hooks)
    if not hasattr(kind, "disable_adapters"):
        return key
    adapter = (str(getattr(module, name, "")) for name in ("disable_adapters", "active_adapters", "merged", "scaling"))
    return key, *adapter


def sample(weights: list[Tensor]) -> bytes:
    """Return up to 127 values of every weight, 64 or more of a larger one, as bytes."""
    flat = [weight.reshape(-1) for weight in weights if weight.numel()]
    samples = [values[:: max(1, len(values) // _SAMPLES)].double().cpu() for values in flat]
    return torch.cat(samples).numpy().tobytes() if samples else b""


def parts(weight: Tensor) -> Iterator[Tensor]:
    """Yield the ordinary tensors that a weight consists of: values and scales where it is quantised, else itself."""
    if not is_traceable_wrapper_subclass(weight):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from parts(getattr(weight, name))


def _pointer(weight: Tensor) -> int:
    try:
        return weight.data_ptr()
    except RuntimeError:  # a tensor subclass without storage of its own
        return id(weight)
