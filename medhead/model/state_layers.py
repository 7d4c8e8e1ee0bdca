"""The layers of a model that hold states, run over trees; `find_states` finds them.

Layers whose functions have dense forms run over all nodes at once (`state_dense`). The reference form wraps the module's own
`forward`, so it holds for every kind of recurrence and convolution: at each depth of a tree it runs on one token of each node,
with a copy of the state of the node's parent. The arithmetic is that of decoding token by token. It reads the weights of these
layers once for each depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from medhead.model.attention import running_states
from medhead.model.kv_cache import CacheLayout
from medhead.model.state_cache import StateCache, StateKey
from medhead.model.state_dense import dense_forward, lru_forward, serves_single
from medhead.model.state_groups import StateGroup


@dataclass(eq=False)
class StateLayers:
    """The modules of a model that hold states.

    Attributes:
        layout: the keys and values that the model caches; it may cache none.
        modules: the modules that read and write states.
        attributes: the states that a module and those inside it hold as attributes: the owner, and the attribute's name.
        cache_type: of the model's caches.
        takes_positions: whether the model takes `position_ids`.
        in_chunks: whether the modules read a prompt in several chunks correctly; some ignore a state that they are given with
            several tokens (Mamba-1, RecurrentGemma), so these prompts are read whole.
        dense: the modules that run over all nodes at once, and how.
        dense_single: those that do so for one node too; others then run their own code for one token.
    """

    layout: CacheLayout
    modules: list[nn.Module]
    attributes: dict[nn.Module, list[tuple[nn.Module, str]]]
    cache_type: type[StateCache]
    takes_positions: bool
    in_chunks: bool = True
    dense: dict[nn.Module, Callable[..., Any]] = field(init=False)
    dense_single: set[nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        found = {
            module: lru_forward(module) if module in self.attributes else dense_forward(module)
            for module in self.modules
        }
        self.dense = {module: forward for module, forward in found.items() if forward is not None}
        self.dense_single = {module for module in self.dense if serves_single(module)}

    def new_cache(self, batch: int, capacity: int) -> StateCache:
        """Return an empty cache for `batch` rows of about `capacity` tokens."""
        return self.cache_type(self.layout, batch, capacity)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the modules' `forward` inside the context, for passes with a `StateCache`."""
        before = [(module, module.__dict__.get("forward")) for module in self.modules]
        for module in self.modules:
            module.forward = partial(self._forward, module, module.forward)
        try:
            yield
        finally:
            for module, own in before:
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache = running_states()
        if cache is None or cache.running is not None:  # an ordinary call, or one inside another module of the list
            return forward(*args, **kwargs)
        tree = cache.ancestors
        if tree is not None and module in self.dense and (tree.nodes > 1 or module in self.dense_single):
            with cache.dense_call(), self._attributes_in(cache, module):
                return self.dense[module](*args, **kwargs)
        batch, nodes = next(x.shape[:2] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3)
        groups, outputs = cache.groups, []
        for group in groups:
            pick = partial(_pick, group, batch, nodes)
            with cache.call(group), self._attributes_in(cache, module):
                outputs.append(forward(*map(pick, args), **{name: pick(value) for name, value in kwargs.items()}))
        return outputs[0] if len(groups) == 1 and groups[0].is_whole else _assemble(groups, outputs, batch, nodes)

    @contextmanager
    def _attributes_in(self, cache: StateCache, module: nn.Module) -> Iterator[None]:
        """Move the states that a module holds as attributes from the cache's running call into the module, and back."""
        held = self.attributes.get(module, [])
        call, before = cache.running, [getattr(owner, name) for owner, name in held]
        assert call is not None
        keys: list[StateKey] = [(name, self.modules.index(module), place) for place, (_, name) in enumerate(held)]
        for key, (owner, name) in zip(keys, held, strict=True):
            setattr(owner, name, call.get(key))
        try:
            yield
            call.states.update({key: getattr(*one) for key, one in zip(keys, held, strict=True)})
        finally:
            for (owner, name), value in zip(held, before, strict=True):
                setattr(owner, name, value)


def _pick(group: StateGroup, batch: int, nodes: int, value: Any) -> Any:
    """Return an argument of a module for the tokens of a group: tensors `[batch or 1, nodes, ...]` are per token."""
    if group.is_whole:
        return value
    if isinstance(value, tuple | list):
        return type(value)(_pick(group, batch, nodes, part) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != nodes or value.shape[0] not in (1, batch):
        return value
    return value.expand(batch, *value.shape[1:]).flatten(0, 1)[group.tokens.to(value.device)]


def _assemble(groups: list[StateGroup], outputs: list[Any], batch: int, nodes: int) -> Any:
    """Return the output of a module for all tokens; padding gets zeros, and what is not per token gets None."""
    first = outputs[0]
    if isinstance(first, tuple | list):
        parts = zip(*outputs, strict=True)
        return type(first)(_assemble(groups, list(part), batch, nodes) for part in parts)
    if not isinstance(first, Tensor) or any(
        one.shape[:2] != group.tokens.shape for one, group in zip(outputs, groups, strict=True)
    ):
        return None
    found = first.new_zeros(batch * nodes, *first.shape[2:])
    for group, output in zip(groups, outputs, strict=True):
        found[group.tokens.to(found.device)] = output
    return found.unflatten(0, (batch, nodes))
