"""Packed copies of a model's linear layers, used while the model decodes on a CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medhead.errors import MedheadError
from medhead.model.model_lock import running_target
from medhead.model.own_code import replaced_forwards
from medhead_kernels import block_linear
from medhead_kernels.packed_linear import MIN_ELEMENTS, PackedLinear, can_pack

_MAX_SHARE = 0.25  # of the free memory that copies may take by default


class PackedWeights:
    """The plain `nn.Linear` layers of a model with their packed copies.

    If `enabled` is None, they are packed where the copies take at most a quarter of the free memory. Small weights are
    left out, for which PyTorch is as fast, unless `every` is set.
    """

    def __init__(self, model: nn.Module, enabled: bool | None = None, every: bool = False) -> None:
        self._least = least = 0 if every else MIN_ELEMENTS
        layers = [] if enabled is False else _packable(model.modules(), least)
        size = sum({id(layer.weight): layer.weight.nbytes for layer in layers}.values())
        if enabled is None and not fits(size):
            layers = []
        if layers and (reason := block_linear.unavailable()) is not None:
            if enabled:
                raise MedheadError(f"packed weights need a kernel of medhead: {reason}; leave --packed out")
            warnings.warn(f"{reason}, so PyTorch multiplies, which is slower", stacklevel=2)
            layers = []
        self._packed = {layer: PackedLinear(layer.weight.detach(), layer.bias, least) for layer in layers}

    @property
    def enabled(self) -> bool:
        """Whether any layer is packed."""
        return bool(self._packed)

    @property
    def nbytes(self) -> int:
        """Memory of the copies made so far, in bytes."""
        return sum(packed.nbytes for packed in self._packed.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the layers' `forward` by `PackedLinear` inside the context, for the passes of targets."""
        layers = [] if torch.is_autocast_enabled("cpu") else _packable(self._packed, self._least)
        for layer in layers:
            packed = self._packed[layer]
            if packed.weight.data_ptr() != layer.weight.data_ptr() or packed.bias is not layer.bias:  # new parameters
                packed = self._packed[layer] = PackedLinear(layer.weight.detach(), layer.bias, self._least)
            packed.recheck()
        with replaced_forwards({layer: partial(_forward, layer, self._packed[layer]) for layer in layers}):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all copies, made now, by name; the names of copies tell the kinds of weights."""
        copies = [packed.copy() for packed in self._packed.values()]
        return {
            f"packed.{index}.{blocks.kind}.{part}": getattr(blocks, part)
            for index, blocks in enumerate(copies)
            for part in ("data", "scales", "minimums")
        }

    def clear(self) -> None:
        """Free the copies; they are made again when they are needed."""
        for packed in self._packed.values():
            packed.clear()


def _forward(layer: nn.Linear, packed: PackedLinear, x: Tensor) -> Tensor:
    return packed(x) if running_target.get() is not None else nn.functional.linear(x, layer.weight, layer.bias)


def _packable(modules: Iterable[nn.Module], least: int) -> list[Any]:
    """Return the plain linear layers whose `forward` was not replaced by other code.

    Where the weight is no parameter (pruning, weight normalisation), a hook computes it anew before every pass.
    """
    plain = (layer for layer in modules if type(layer) is nn.Linear and "forward" not in layer.__dict__)
    return [layer for layer in plain if "weight" in layer._parameters and can_pack(layer.weight, least)]


def fits(size: int) -> bool:
    """Whether copies of `size` bytes take at most a quarter of the free memory."""
    return size <= _MAX_SHARE * free_bytes()


def free_bytes() -> int:
    """Return the memory in bytes that this process may still take; 0 where it is unknown."""
    return min(_system_free_bytes(), cgroup_free_bytes())


def _system_free_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":", 1) for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:  # not Linux: half of the physical memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 0


def cgroup_free_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory in bytes below a container's limit (cgroup version 2 or 1); 2^62 without a limit."""
    version_1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"
    for limit, used in (("memory.max", "memory.current"), version_1):
        try:
            return max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # a missing file, or "max"
            continue
    return 1 << 62
