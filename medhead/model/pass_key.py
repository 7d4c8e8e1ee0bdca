"""Name of a compiled pass across processes; `medhead.model.fingerprint` is the identity within one process."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

import medhead
import medhead_kernels
from medhead.model.layout import attention_configs
from medhead_kernels.bench_report import cpu_name

if TYPE_CHECKING:
    from medhead.model.target import Target

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def pass_key(target: Target, form: Hashable) -> str | None:
    """Return a hash of all that the machine code of a pass depends on, which is not the values of the weights.

    Hooks, replaced functions and adapters can do anything, so a model with these has None.

    Args:
        target: active.
        form: of the pass.
    """
    modules = list(target.model.named_modules())
    files = _source_files([module for _, module in modules])
    if files is None or any(_is_changed(module) for _, module in modules):
        return None
    roots = Path(medhead.__path__[0]), Path(medhead_kernels.__path__[0])
    own = [file for root in roots for kind in ("*.py", "*.cpp") for file in root.rglob(kind)]
    parts = (
        form,
        _machine(),
        torch.__version__,
        torch.version.git_version,
        transformers.__version__,
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(own) + files],
        json.dumps(target.model.config.to_dict(), sort_keys=True, default=str),
        target.backend.name,
        [config._attn_implementation for config in attention_configs(target.model)],
        sorted((index, repr(pair)) for index, pair in target.layout.layers.items()),
        [_structure(name, module) for name, module in modules],
    )
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def _machine() -> tuple[Any, ...]:
    """Return the processor and the settings of PyTorch that its machine code depends on."""
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    capability = torch.backends.cpu.get_cpu_capability()
    return platform.platform(), cpu_name(), capability, torch.get_num_threads(), autocast, precision


def _source_files(modules: list[nn.Module]) -> list[Path] | None:
    """Return the source files of the modules' classes and their bases; None if one has no file."""
    names = {kind.__module__ for module in modules for kind in type(module).__mro__} - {"builtins"}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    return None if None in files else sorted(Path(str(file)) for file in files)


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module has hooks or a `forward` of other code, or adapters of PEFT."""
    own = [module.__dict__["forward"]] if "forward" in module.__dict__ else []
    hooks = (*own, *module._forward_pre_hooks.values(), *module._forward_hooks.values())
    foreign = any(not getattr(hook, "func", hook).__module__.startswith("medhead.") for hook in hooks)
    adapted = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
    return foreign or adapted


def _structure(name: str, module: nn.Module) -> tuple[Any, ...]:
    """Return the class of a module, its plain attributes, and the form of its own weights and buffers."""
    plain = sorted((key, value) for key, value in vars(module).items() if _is_plain(value))
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tensors = [(key, type(part).__name__, part.dtype, tuple(part.shape), part.stride()) for key, part in own]
    return name, type(module).__module__, type(module).__qualname__, plain, tensors


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))
