"""Products and activations whose rows do not depend on how many rows a pass has; for `exact`.

A library picks another kernel for another number of rows, and sums in another order there. But most numbers of rows belong to
one class that agrees bit for bit. For every shape of weights the smallest number is found from which on all up to 32 agree, on
rows that the model itself computed: fewer rows are padded to it, more are split. Where there is no such class, all products
have 16 rows, or one.

On a GPU all products have 64 rows, and so have norms with a weight, because PyTorch picks the order of a mean by the number of
rows. Activations need nothing there: each number is computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medhead.model.attention import running_visits
from medhead.model.own_code import replaced_forwards

MAX_ROWS = 32
_SIZES = (31, 24, 17, 16, 15, 12, 8, 7, 5, 4, 3, 2, 1)  # numbers of rows that are compared with 32
_FEW = 2**17
_SERIAL = 2**15 - 1  # elements up to which PyTorch runs an activation in one thread
_VECTOR = 64  # elements; a row of a multiple of it has no tail that is computed one by one

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowClass:
    """Numbers of rows that agree: a product has at least `least` and at most `most` rows."""

    least: int
    most: int

    def apply(self, product: Product, rows: Tensor) -> Tensor:
        """Compute `product` of rows `[n, size]` by products of allowed numbers of rows."""
        if self.least <= len(rows) <= self.most:
            return product(rows)
        parts = [self._padded(product, part) for part in rows.split(self.most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _padded(self, product: Product, rows: Tensor) -> Tensor:
        missing = self.least - len(rows)
        return product(rows) if missing <= 0 else product(F.pad(rows, (0, 0, 0, missing)))[: len(rows)]


SIXTEEN, ONE, SIXTY_FOUR = RowClass(16, 16), RowClass(1, 1), RowClass(64, 64)


class RowProducts(TorchFunctionMode):
    """Computes products with weights and activations row-independently.

    Inside `with`, all of this thread; that costs some microseconds for every operation of PyTorch. Inside `replaced`, those of
    linear layers, activation modules, and modules with weights of their own (experts), in passes over nodes.

    Args:
        everywhere: passes run inside `with` too.
        forced: the class of all products; None finds one for each shape at its first use.
        on_gpu: whether `forced` is the class of norms too, and activations are left alone.

    Attributes:
        classes: by shape, what was found.
    """

    def __init__(self, everywhere: bool = False, forced: RowClass | None = None, on_gpu: bool = False) -> None:
        super().__init__()
        self.everywhere, self.forced, self.on_gpu = everywhere, forced, on_gpu
        self.classes: dict[Any, RowClass] = {}

    @contextmanager
    def replaced(self, model: nn.Module) -> Iterator[None]:
        """Replace the `forward` of modules inside the context; other code in its place stays."""
        own = [module for module in model.modules() if "forward" not in module.__dict__]
        found = {module: forward for module in own if (forward := self._forward(module)) is not None}
        with replaced_forwards({one: partial(_in_passes, forward, one.forward) for one, forward in found.items()}):
            yield

    def _forward(self, module: nn.Module) -> Callable[..., Any] | None:
        """Return what computes a module's output row-independently; None if nothing in it needs that."""
        weights = [weight for weight in module._parameters.values() if weight is not None and weight.ndim > 1]
        if type(module) is nn.Linear and weights:
            return self._linear_forward(module.weight, module.bias)
        other = not isinstance(module, nn.Linear) and not module._modules
        if other and isinstance(getattr(module, "in_features", None), int):  # a linear layer of another kind
            own, key = module.forward, (type(module), module.in_features, module.out_features, module.bias is None)
            return lambda x: self.product(x, (key, x.dtype), own)
        if type(module).__module__ in _ACTIVATION_FILES:
            return partial(_activation, self, module.forward)
        if self.on_gpu and not weights and not module._modules and module._parameters:
            return self._norm_forward(module.forward, type(module))
        if not weights or isinstance(module, nn.Embedding):
            return None
        inside = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self:
                return inside(*args, **kwargs)

        return forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what has a handler; all else runs as it is."""
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, func, *args, **(kwargs or {}))

    def _linear_forward(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """Return a linear layer that looks its class up once."""
        key = _key((F.linear, bias is None), weight)
        found: RowClass | None = None

        def forward(x: Tensor) -> Tensor:
            nonlocal found
            if found is not None and found.least <= x.numel() // x.shape[-1] <= found.most:
                return F.linear(x, weight, bias)
            out = _linear(self, F.linear, x, weight, bias)
            found = self.classes.get(key)  # none with `forced`, so that every call has its number of rows
            return out

        return forward

    def _norm_forward(self, own: Product, kind: type) -> Callable[..., Tensor]:
        """Return a module of whole rows whose calls have as many rows as products have."""

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return own(x, *args, **kwargs) if args or kwargs else self.product(x, kind, own)

        return forward

    def product(self, x: Tensor, key: Any, product: Product) -> Tensor:
        """Compute `product` of the rows of `x` `[..., size]`; `key` tells products of other shapes apart."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if not len(rows):
            return product(x)
        found = self.forced or self.classes.get(key)
        if found is None:
            found = self.classes[key] = _find(product, rows)
        return found.apply(product, rows).view(*x.shape[:-1], -1)


def _key(product: Any, weight: Tensor) -> Any:
    return product, weight.shape, weight.dtype, type(weight)


def _find(product: Product, rows: Tensor) -> RowClass:
    """Return the class of a product, from rows `[n, size]` of a pass."""
    repeats = torch.arange(MAX_ROWS) // len(rows)  # rows that repeat are scaled
    sample = (rows[torch.arange(MAX_ROWS) % len(rows)] * (1 + repeats.to(rows) / 8)[:, None]).contiguous()
    return _class_of(product, sample)


def _class_of(product: Product, sample: Tensor) -> RowClass:
    """Return the class of rows by comparing products of fewer rows of `sample` `[32, size]` with that of all."""
    order = torch.randperm(MAX_ROWS, generator=torch.Generator().manual_seed(0))
    whole = product(sample)
    samples = [(sample, whole)]
    if whole.numel() < _FEW:  # few numbers may be rounded alike by chance
        samples += [(other, product(other)) for other in (sample.flip(1), sample.roll(1, 1), -0.7 * sample)]
    differs = 0
    for size in _SIZES:
        if any(not torch.equal(product(given[order[:size]]), found[order[:size]]) for given, found in samples):
            differs = size
            break
    least = next((least for least in (1, 2, 4, 8, 16) if least > differs), None)
    if least is not None:
        return RowClass(least, MAX_ROWS)
    first = product(sample[:16])
    other = order[order < 16]
    return SIXTEEN if torch.equal(product(sample[other]), first[other]) else ONE


def _in_passes(forward: Callable[..., Any], own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (own if running_visits() is None else forward)(*args, **kwargs)


# ---------------------------------------------------------------- handlers


def _linear(mode: RowProducts, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    key = _key((func, bias is None), weight)
    return mode.product(input, key, lambda rows: func(rows, weight, bias))


def _matmul(mode: RowProducts, func: Any, input: Tensor, other: Tensor) -> Tensor:
    if other.ndim == 2 and input.ndim >= 2:
        key = _key((torch.mm, other.stride(1)), other)
        return mode.product(input, key, lambda rows: torch.mm(rows, other))
    if other.ndim == input.ndim == 3 and isinstance(other, nn.Parameter):  # a matrix for each expert
        pairs = zip(input, other, strict=True)
        return torch.stack([_matmul(mode, func, rows, weight) for rows, weight in pairs])
    return func(input, other)


def _addmm(mode: RowProducts, func: Any, bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Tensor:
    return mode.product(input, _key(func, weight), lambda rows: func(bias, rows, weight, **scales))


def _activation(mode: RowProducts, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute an activation of whole rows in one thread; of one row as the model does."""
    size = input.shape[-1] if input.ndim else 0
    if not size or input.numel() == size or mode.on_gpu:
        return func(input, *args, **kwargs)
    together = max(1, _SERIAL // size) if size % _VECTOR == 0 else 1
    parts = input.reshape(-1, size).split(together)
    return torch.cat([func(part.contiguous(), *args, **kwargs) for part in parts]).view(input.shape)


_ACTIVATION_FILES = ("transformers.activations", "torch.nn.modules.activation")
_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
_ACTIVATIONS = (
    F.silu, F.gelu, F.sigmoid, F.tanh, F.softplus, F.mish, torch.sigmoid, torch.tanh, torch.exp, torch.pow, torch.erf,
    Tensor.sigmoid, Tensor.tanh, Tensor.exp, Tensor.pow, Tensor.erf,
)  # fmt: skip
_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(_ACTIVATIONS, _activation),
}
