"""Other code in place of modules' forwards, or of functions that these call; the modeling file is not changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of modules, which have those of their classes, inside the context."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


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
