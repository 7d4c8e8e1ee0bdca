"""The code of a model's own modules with other functions in place of some that it calls; the modeling file is not changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn


def global_names(module: nn.Module) -> set[str]:
    """Return the names of globals and attributes that the forward of a module's class uses; empty if it is no Python code."""
    forward = inspect.unwrap(type(module).forward)
    return set(forward.__code__.co_names) if isinstance(forward, FunctionType) else set()


def global_value(module: nn.Module, name: str) -> Any:
    """Return what the forward of a module's class finds under one of its `global_names`."""
    return _code(module).__globals__[name]


def with_globals(module: nn.Module, replaced: dict[str, Any]) -> Callable[..., Any]:
    """Return the forward of a module's class, without its decorators, that finds `replaced` under these global names."""
    forward = _code(module)
    code, scope = forward.__code__, forward.__globals__ | replaced
    made = FunctionType(code, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return partial(made, module)


def _code(module: nn.Module) -> FunctionType:
    forward = inspect.unwrap(type(module).forward)
    assert isinstance(forward, FunctionType), "global_names is empty for other forwards"
    return forward
