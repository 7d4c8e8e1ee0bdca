"""The linear layers of a model, multiplied with packed copies of their weights while the model decodes on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medhead_kernels.skinny_gemm import PackedLinear, PackGroup, can_pack

_SHARE = 0.25  # of the memory that is free: copies may take so much unless they are asked for


class PackedWeights:
    """What of a model can be packed.

    Args:
        model: its plain `nn.Linear` layers are packed; all others are left alone.
        wanted: whether to pack; None packs where the copies take at most a quarter of the memory that is free.
    """

    def __init__(self, model: nn.Module, wanted: bool | None = None) -> None:
        layers = [] if wanted is False else _packable(model.modules())
        size = sum({id(layer.weight): layer.weight.numel() * layer.weight.element_size() for layer in layers}.values())
        if wanted is None and not fits(size):
            layers = []
        self._matrices = {layer: PackedLinear(layer.weight.detach(), layer.bias) for layer in layers}
        self._together = PackGroup(list(self._matrices.values()))

    @property
    def on(self) -> bool:
        """Whether there is anything to pack."""
        return bool(self._matrices)

    @property
    def nbytes(self) -> int:
        """Memory of the copies made so far."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the layers multiply by `PackedLinear`; afterwards they are as they were."""
        taken = [] if torch.is_autocast_enabled("cpu") else _packable(self._matrices)
        for layer in taken:
            matrix = self._matrices[layer]
            if matrix.weight.data_ptr() != layer.weight.data_ptr() or matrix.bias is not layer.bias:
                matrix = self._matrices[layer] = PackedLinear(layer.weight.detach(), layer.bias)  # it was given others
                matrix.together = self._together
            matrix.recheck()
            layer.forward = matrix
        try:
            yield
        finally:
            for layer in taken:
                del layer.forward

    def clear(self) -> None:
        """Give the copies back; they are made again when they are needed."""
        for matrix in self._matrices.values():
            matrix.clear()


def _packable(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that are plain linear layers whose forward nobody else has changed."""
    return [
        layer
        for layer in modules
        if type(layer) is nn.Linear and "forward" not in layer.__dict__ and can_pack(layer.weight)
    ]


def fits(size: int) -> bool:
    """Whether copies of so many bytes take at most a quarter of the memory that is free."""
    return size <= _SHARE * free_bytes()


def free_bytes() -> int:
    """Memory that this process may still take; 0 where nobody can tell."""
    return min(_free_of_computer(), _free_of_group())


def _free_of_computer() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            known = dict(line.split(":", 1) for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 0


def _free_of_group(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves (control groups, version 2 or 1); a very large number where there is none."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return 1 << 62
