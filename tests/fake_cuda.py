"""CUDA tensors that hold nothing, on any machine: what a captured step does with devices can be tested without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
needs_fake_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU tests/gpu runs the real thing")
_CUDA_TYPE, _META_TYPE = 1, 14  # places in PyTorch's table of device guards


@cache
def _allow_cuda_tensors() -> None:
    """Give a build of PyTorch without CUDA a device guard for it that does nothing, the one of the meta device."""
    libraries = Path(torch.__file__).parent / "lib"
    table = ctypes.CDLL(str(next(libraries.glob("libc10.*"))))
    guards = (ctypes.c_void_p * (_META_TYPE + 1)).in_dll(table, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[_CUDA_TYPE]:
        guards[_CUDA_TYPE] = guards[_META_TYPE]


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `Module._apply` does, which cannot replace fake weights: they must have the wanted type and device."""
    for weight in module.parameters():
        assert function(weight) is weight, f"make {type(module).__name__} in its type, on its device"
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = function(buffer)
    return module


@cache
def _mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)  # one for all tests: tables that are kept belong to it


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make every new tensor a fake one: it has a shape, a type and a device, which may be `CUDA`; reading it is an error."""
    _allow_cuda_tensors()
    capability = patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    first = patch("medhead.model.target.first_position", lambda model: 0)  # it reads a tensor when a target is made
    with capability, first, patch.object(nn.Module, "_apply", _convert), _mode(), torch.no_grad():
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Operations(TorchDispatchMode):
    """Notes the names of operations that are not views of a tensor, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.check(func, [leaf for leaf in tree_leaves([args, kwargs, out]) if isinstance(leaf, Tensor)])
        if not func.is_view:
            self.names.append(str(func))
        return out

    def check(self, func: Any, tensors: list[Tensor]) -> None:
        """Refuse an operation on these arguments and results."""


class OnlyCuda(Operations):
    """Refuses tensors of the host and copies from and to it, as the capture of a CUDA graph does."""

    def check(self, func: Any, tensors: list[Tensor]) -> None:
        """See `Operations.check`; a number that PyTorch wraps in a tensor becomes an argument of the kernel."""
        copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
        host = [tensor for tensor in tensors if tensor.device != CUDA and (tensor.dim() > 0 or copies)]
        assert not host, f"{func} of a captured step works on the host: {host}"
