"""Which layers of a model hold states, found by passes over two tokens; there is no list of supported names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from medhead.errors import UnsupportedTargetError
from medhead.model.eval_mode import eval_mode
from medhead.model.kv_cache import CacheLayout
from medhead.model.layout import (
    cache_argument,
    describe_failure,
    find_layout,
    input_device,
    other_layers,
    own_cache,
)
from medhead.model.state_cache import StateCache, StateCall, StateKey, cache_class
from medhead.model.state_layers import StateLayers

_TOKENS = 2  # of a pass; one token takes another way through these layers
_SAME = 1e-5  # relative difference of logits below which a state had no effect


def find_layers(model: Any) -> tuple[CacheLayout, StateLayers | None]:
    """Return what a model caches, and its layers that hold states, if any do."""
    try:
        return find_layout(model), None
    except UnsupportedTargetError:  # also because of layers that hold states
        layers = find_state_layers(model)
        if layers is None:
            raise
        return layers.layout, layers


@torch.no_grad()
def find_state_layers(model: Any) -> StateLayers | None:
    """Return the layers of a model that hold states; None if there are none.

    Raises:
        UnsupportedTargetError: the states cannot be told from keys and values, or transformers is older than 5.24.
    """
    name, before = type(model).__name__, _attributes(model)
    try:
        with eval_mode(model):
            return _find(model)
    except UnsupportedTargetError:
        raise
    except Exception as error:
        raise UnsupportedTargetError(
            f"{name} does not run with a cache of states: {describe_failure(error)}"
        ) from error
    finally:
        _set_attributes(before)


def _find(model: Any) -> StateLayers | None:
    own = own_cache(model)
    if own is not None and other_layers(own):
        return None
    is_old = not hasattr(Cache, "get_recurrent_state")
    if is_old:
        _refuse_states(model, own)
    if own is None or is_old:
        return None
    layout = CacheLayout.of(own)
    found = _Finder(model, layout, cache_class(type(own)))
    states = found.run(0, {})[1]
    return found.layers(found.continues(states)) if states else None


def _refuse_states(model: Any, own: Cache | None) -> None:
    """Name the needed transformers if a model left states in its cache, or in attributes as RecurrentGemma does."""
    caches = [] if own is None else [own, *own.layers]
    kept = any(hasattr(part, name) for part in caches for name in ("conv_states", "recurrent_states", "linear_cache"))
    if kept or any(isinstance(value, Tensor) for value in _attributes(model).values()):
        raise UnsupportedTargetError(
            f"{type(model).__name__} has layers that cache more than keys and values (recurrent or convolutional ones); "
            "medhead verifies trees with them in transformers 5.24 and newer"
        )


class _Recorder:
    """Notes which modules ask a `StateCache` for states, and which store keys and values."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.askers: dict[nn.Module, None] = {}
        self.writers: set[nn.Module] = set()

    def _current(self) -> StateCall:
        self.askers[_calling_module()] = None
        return super()._current()  # type: ignore[misc]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.writers.add(_calling_module())
        return super().update(*args, **kwargs)  # type: ignore[misc]


def _calling_module() -> nn.Module:
    """Return the innermost module whose method called the method of the cache that called this."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
        frame = frame.f_back
    assert frame is not None, "a cache is used by modules"
    return frame.f_locals["self"]


class _Finder:
    """Runs a model over a few tokens with a cache that records."""

    def __init__(self, model: Any, layout: CacheLayout, cache_type: type[StateCache]) -> None:
        self.model, self.layout, self.cache_type = model, layout, cache_type
        self.cache: Any = type("RecorderCache", (_Recorder, cache_type), {})(layout, 1, 2 * _TOKENS)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.attributes: list[tuple[nn.Module, str]] = []

    def run(self, start: int, states: dict[StateKey, Tensor]) -> tuple[Tensor, dict[StateKey, Tensor]]:
        """Return the logits of two tokens after `start`, and the states that they leave."""
        device = input_device(self.model)
        positions = start + torch.arange(_TOKENS, device=device)[None]
        self.cache.lengths.set([start])
        self.cache.begin(_TOKENS)
        self.cache.running = call = StateCall(states.get)
        given = {cache_argument(self.model): self.cache}
        if self.takes_positions:
            given["position_ids"] = positions
        before = _attributes(self.model)
        for place, (owner, name) in enumerate(self.attributes):
            setattr(owner, name, states[name, "attribute", place])
        try:
            logits = self.model(input_ids=positions, use_cache=True, **given).logits  # equal tokens would hide errors
            after = _attributes(self.model)
        finally:
            _set_attributes(before)
        if not self.attributes:
            self.attributes = [
                one for one, value in after.items() if value is not None and value is not before.get(one)
            ]
        held = {(one[1], "attribute", place): after[one] for place, one in enumerate(self.attributes)}
        return logits, call.states | held

    def continues(self, states: dict[StateKey, Tensor]) -> bool:
        """Return whether two tokens after others depend on every kind of state that these left."""
        logits = self.run(_TOKENS, _copies(states))[0]
        scale = float(logits.abs().max())
        for kind in {(key[0], key[2]) for key in states}:
            changed = {key: state + ((key[0], key[2]) == kind) for key, state in states.items()}
            if float((self.run(_TOKENS, changed)[0] - logits).abs().max()) <= _SAME * scale:
                return False
        return True

    def layers(self, in_chunks: bool) -> StateLayers:
        """Return what was found.

        Raises:
            UnsupportedTargetError: a module holds states and keys and values.
        """
        for module in self.cache.askers.keys() & self.cache.writers:
            raise UnsupportedTargetError(
                f"{type(self.model).__name__} keeps recurrent states and keys and values in one module "
                f"({type(module).__name__}); medhead cannot verify trees with it"
            )
        parents = {child: parent for parent in self.model.modules() for child in parent.children()}
        owners = {owner for owner, _ in self.attributes}
        held: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for owner, name in self.attributes:
            outer = owner
            while parents.get(outer) in owners:
                outer = parents[outer]
            held.setdefault(outer, []).append((owner, name))
        modules = list(self.cache.askers | dict.fromkeys(held))
        return StateLayers(self.layout, modules, held, self.cache_type, self.takes_positions, in_chunks)


def _attributes(model: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """Return the attributes in which modules may hold states: None, or tensors that are no buffers."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith(("state", "states")) and (value is None or isinstance(value, Tensor))
    }


def _set_attributes(values: dict[tuple[nn.Module, str], Any]) -> None:
    for (module, name), value in values.items():
        setattr(module, name, value)


def _copies(states: dict[StateKey, Tensor]) -> dict[StateKey, Tensor]:
    return {key: state.clone() for key, state in states.items()}
