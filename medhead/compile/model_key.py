"""Identity of a model's pass across processes: what its traced operations and packed weights depend on.

`medhead.model.fingerprint` is the identity within one process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn

import medhead
import medhead_kernels
from medhead.compile.packages import setting, tensor_digest

if TYPE_CHECKING:
    from medhead.model.target import Target

_PLAIN = (bool, int, float, str, type(None))


def model_key(target: Target) -> tuple[Any, ...] | None:
    """Return what determines the passes of a target, or None where only a trace can tell.

    That is the code of medhead and of the model, the configuration, the plain attributes of all modules, and the values of
    all weights and buffers. Hooks, replaced functions and adapters can do anything, so a model with these has no key.
    """
    modules = list(target.model.named_modules())
    if any(_is_changed(module) for _, module in modules):
        return None
    names = sorted({type(module).__module__ for _, module in modules})
    code = [_code(name) for name in names if not name.startswith("torch.")]
    tensors = [(f"{name}.{key}", value) for name, module in modules for key, value in _tensors(module)]
    if None in code or any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for _, tensor in tensors):
        return None
    return (
        setting(),
        transformers.__version__,
        _own_code(),
        code,
        json.dumps(target.model.config.to_dict(), sort_keys=True, default=str),
        [(name, type(module).__qualname__, _plain_attributes(module)) for name, module in modules],
        tensor_digest(tensors),
        target.backend.name,
        sorted((index, repr(pair)) for index, pair in target.layout.layers.items()),
    )


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module has hooks of other code, a `forward` of its own, or adapters of PEFT."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    foreign = any(not getattr(hook, "func", hook).__module__.startswith("medhead.") for hook in hooks)
    return foreign or "forward" in module.__dict__ or hasattr(type(module), "disable_adapters")


def _plain_attributes(module: nn.Module) -> list[tuple[str, str]]:
    return sorted((name, repr(value)) for name, value in vars(module).items() if isinstance(value, _PLAIN))


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own weights, buffers and other tensors."""
    stores = (module._parameters, module._buffers, vars(module))
    return [(name, value) for store in stores for name, value in store.items() if isinstance(value, Tensor)]


def _code(name: str) -> tuple[Any, ...] | None:
    """Return the hash of a module's source file and the origin of its functions, some of which other code may have replaced."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    functions = inspect.getmembers(module, callable)
    origin = [(key, getattr(value, "__module__", ""), getattr(value, "__qualname__", "")) for key, value in functions]
    return name, hashlib.sha256(Path(file).read_bytes()).hexdigest(), origin


def _own_code() -> str:
    """Return a hash of the source files of medhead and its kernels."""
    digest = hashlib.sha256()
    for package in (medhead, medhead_kernels):
        for file in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
