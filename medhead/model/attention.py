"""The attention function and the mask function that a target uses while it verifies trees.

transformers lets a model's attention (`AttentionInterface`) and its mask (`AttentionMaskInterface`) be replaced by name.
The mask function receives each layer's own mask function (causal, sliding window, chunks), a predicate on positions. Here
it is evaluated on the positions of tree nodes and combined with the ancestors of each node. So every mask that transformers
can express holds for trees, and no modeling file is copied or patched.

The name is set in the model's configuration, which all threads share. The running pass belongs to one thread. Without one the
functions call the model's own attention and mask functions, so an ordinary call of the model in another thread is served as
if no target were active (`attention_name`).

A kernel backend (`medhead_kernels.backends`) needs no dense mask. For a causal or sliding-window layer the mask function
returns an empty tensor whose last size is the window; every other layer gets its dense mask.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from medhead.errors import MedheadError, UnsupportedTargetError
from medhead.model import node_attention
from medhead.model.alibi import place_bias
from medhead.model.kv_cache import CacheLayout
from medhead.model.node_attention import NodeVisits
from medhead.model.query_scale import rescale_query
from medhead_kernels import reference, sdpa
from medhead_kernels.attn_metadata import AttnParams, TreeMetadata, additive_mask, positions, visible_keys
from medhead_kernels.backends import (
    BACKENDS,
    AttnSpec,
    Backend,
    BackendError,
    cached_unsupported_reason,
    select_backend,
)
from medhead_kernels.causal import HALF_DTYPES, is_supported

NAME = "medhead"
_ARGUMENTS_BY_ORDER = {"position_bias", "sinks", "block_indices"}


@dataclass
class TreePass:
    """Arguments of attention that belong to the running pass."""

    lengths: Tensor | None  # `[batch]` int64, committed tokens of every row, or None when all rows have `max_length`
    max_length: int  # the largest length, on the host; an upper bound where only the device knows the lengths
    depth: Tensor  # `[batch or 1, nodes]`, depth of every node
    visible: Tensor | None  # `[batch or 1, nodes, nodes]` bool, node i sees node j; None for a chain
    nodes: int  # number of nodes in this pass
    use_reference: bool = False  # use the reference attention in every layer, for comparison
    backend: Backend | None = None  # a kernel backend for the layers that it supports
    host_lengths: tuple[int, ...] = ()  # committed tokens of every row; empty where only the device knows them
    scale_floor: int | None = None  # the position from which on layers scale their queries, see `query_scale`
    cache_length: int = 0  # what the cache says its length is
    # rows of a pass over whole prompts, whose mask functions alone say what a token sees; 0 for any other pass
    prompts: int = 0
    ancestor_bitmask: Tensor | None = None  # see `TokenTree.ancestor_bitmask`; required with a backend
    states: Any = None  # the `StateCache` of a model whose layers hold states
    dense: bool = False  # every mask is a tensor, because the model's own code reads it
    alibi: Tensor | None = None  # `[heads]` slopes of a model that adds ALiBi by its own code; only with `dense`
    visits: NodeVisits | None = None  # every node attends on its own, see `node_attention`; None for together
    _biases: dict[Any, Tensor] = field(default_factory=dict, init=False)
    _metadata: dict[torch.device, TreeMetadata] = field(default_factory=dict, init=False)

    @property
    def num_keys(self) -> int:
        """Columns of keys: longest prefix plus nodes."""
        return self.max_length + self.nodes

    def metadata(self, device: torch.device) -> TreeMetadata:
        """Return the arguments of a backend on a layer's device."""
        if device not in self._metadata:
            assert self.ancestor_bitmask is not None, "a pass with a backend needs ancestor_bitmask"
            if self.host_lengths:
                lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device=device)
            else:
                assert self.lengths is not None, "a pass needs lengths or host_lengths"
                lengths = self.lengths.to(device, torch.int32)
            bitmask, depth = self.ancestor_bitmask.to(device), self.depth.to(device)
            self._metadata[device] = TreeMetadata(lengths, self.host_lengths, bitmask, depth)
        return self._metadata[device]

    def bias(
        self, mask_function: Callable, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        """Return the additive mask `[batch or 1, 1, nodes, keys]` of one mask function.

        None stands for plain attention: one node that sees every key, or several causal nodes; those have a prefix only where
        a flash kernel may serve them, see `causal.attention`.
        """
        flash = device.type == "cuda" and dtype in HALF_DTYPES
        fits = window is not None and self.num_keys <= window and not self.prompts
        causal = mask_function is causal_mask_function or fits
        plain = flash or self.nodes == 1 or self.max_length == 0
        if causal and self.lengths is None and self.visible is None and plain and not self.dense:
            return None
        key = (None if causal else mask_function, dtype, device)
        if key not in self._biases:
            if causal:
                visible = self._visible_keys(device)
            else:
                visible = self._allowed_keys(mask_function, device)
                visible = visible if self.prompts else visible & self._visible_keys(device)
            self._biases[key] = additive_mask(visible, dtype)[:, None]
            if self.alibi is not None and self.visible is not None:
                lengths = torch.tensor([self.max_length]) if self.lengths is None else self.lengths
                bias = place_bias(self.alibi, lengths.to(device), self.depth, self.num_keys)
                self._biases[key] = self._biases[key] + bias.to(dtype)
        return self._biases[key]

    def _visible_keys(self, device: torch.device) -> Tensor:
        """Return `[batch or 1, nodes, keys]`: the key is in the row's prefix, or is the node or its ancestor."""
        tree = self.visible
        if tree is None:
            tree = torch.ones(self.nodes, self.nodes, dtype=torch.bool, device=device).tril()[None]
        if self.lengths is None:
            return torch.nn.functional.pad(tree.to(device), (self.max_length, 0), value=True)
        return visible_keys(self.lengths.to(device), tree.to(device), self.num_keys)

    def positions(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Return the positions of the nodes, `[batch or 1, nodes]`, and of all keys, `[batch or 1, keys]`."""
        lengths = torch.tensor([self.max_length]) if self.lengths is None else self.lengths
        return positions(lengths.to(device), self.depth.to(device), self.num_keys)

    def _allowed_keys(self, mask_function: Callable, device: torch.device) -> Tensor:
        """Evaluate a layer's mask function on positions: `[batch or 1, nodes, keys]`."""
        queries, keys = self.positions(device)
        batch = self.prompts or queries.shape[0]
        rows = torch.arange(batch, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        allowed = mask_function(rows, head, queries[:, None, :, None], keys[:, None, None, :])
        return allowed.expand(batch, 1, self.nodes, self.num_keys)[:, 0]


_running: ContextVar[TreePass | None] = ContextVar("medhead_pass", default=None)


_masks_seen: ContextVar[set[int | None] | None] = ContextVar("medhead_masks_seen", default=None)


@contextmanager
def windows_seen() -> Iterator[set[int | None]]:
    """Yield a set that gets the window (None without one) of every mask that is made inside the context."""
    seen = set[int | None]()
    token = _masks_seen.set(seen)
    try:
        yield seen
    finally:
        _masks_seen.reset(token)


@contextmanager
def tree_pass(current: TreePass) -> Iterator[None]:
    """Make `current` the running pass of this thread."""
    token = _running.set(current)
    try:
        yield
    finally:
        _running.reset(token)


def is_running() -> bool:
    """Return whether this thread runs a pass over a `TreeCache`."""
    return _running.get() is not None


def running_states() -> Any:
    """Return the `StateCache` of the running pass of this thread; None without one."""
    current = _running.get()
    return None if current is None else current.states


def running_key_positions(device: torch.device | str | None) -> Tensor | None:
    """Return the positions `[batch or 1, keys]` of all keys of the running pass of this thread; None without one."""
    current = _running.get()
    return None if current is None else current.positions(device)[1]


def running_visits() -> NodeVisits | None:
    """Return the visits of the running pass of this thread; None without one, and where nodes attend together."""
    current = _running.get()
    return None if current is None else current.visits


def _mask(current: TreePass, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the additive mask of the running pass; transformers calls this once per mask function and pass."""
    device = torch.device(kwargs.get("device") or current.depth.device)
    if (seen := _masks_seen.get()) is not None:
        seen.add(kwargs.get("local_size"))
    mask_function, local_size = kwargs.get("mask_function", causal_mask_function), kwargs.get("local_size")
    if current.visits is not None:
        return current.visits.first_keys(mask_function, device)
    if current.backend is not None and (window := mask_window(mask_function)) is not None:
        hides_keys = current.num_keys > window
        return torch.empty(0, 1, current.nodes, window if hides_keys else 0, device=device)  # see the module docstring
    bias = current.bias(mask_function, local_size, kwargs.get("dtype", torch.float32), device)
    if current.dense and bias is not None:  # some code checks that the mask has every row
        bias = bias.expand(kwargs.get("batch_size", len(bias)), -1, -1, -1)
    return bias


def mask_window(mask_function: Callable) -> int | None:
    """Return the sliding window of a causal mask function of transformers, 0 without one, None for any other function."""
    if mask_function is causal_mask_function:
        return 0
    parts = _closure(mask_function).get("mask_functions", ())
    if not _same_code(mask_function, _WINDOW_MASK) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _closure(parts[0]).get("sliding_window")
    is_window = _same_code(parts[0], _closure(_WINDOW_MASK)["mask_functions"][0])
    return window if is_window and isinstance(window, int) and window > 0 else None


_WINDOW_MASK = sliding_window_causal_mask_function(1)
_window_mask = lru_cache(maxsize=8)(sliding_window_causal_mask_function)


def _closure(function: Callable) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    return {} if code is None else dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _same_code(one: Callable, other: Callable) -> bool:
    code = getattr(one, "__code__", None)
    return code is not None and code is getattr(other, "__code__", None)


@lru_cache(maxsize=64)
def warn_dense_fallback(backend: str, reason: str) -> None:
    """Warn once per process and reason that layers fall back to a dense mask."""
    warnings.warn(
        f"attention {backend!r} cannot serve some layers of this model ({reason}); "
        "they fall back to a dense mask, which is slower (sdpa, or reference for soft-capping and sinks)",
        stacklevel=2,
    )


def pick_backend(name: str, layout: CacheLayout, dense_masks: bool) -> Backend:
    """Return the backend of this name, or the best one for `auto`, for keys and values of this layout.

    Raises:
        MedheadError: it cannot serve them.
    """
    specs = [AttnSpec(key.device.type, key.dtype, key.dim, value.dim) for key, value in layout.layers.values()]
    try:
        backend = select_backend(name, specs)
    except BackendError as error:
        raise MedheadError(str(error)) from None
    if not dense_masks or backend.needs_dense_mask:
        return backend
    if name != "auto":
        warn_dense_fallback(name, "the model's own code reads the mask")
    return BACKENDS["sdpa"]


def _backend_attention(
    current: TreePass, query: Tensor, key: Tensor, value: Tensor, params: AttnParams
) -> tuple[Tensor | None, Tensor | None]:
    """Return the backend's output, or None and the dense mask for a layer that the backend does not support."""
    assert current.backend is not None, "an empty mask means that the pass has a backend"
    reason = cached_unsupported_reason(current.backend.name, AttnSpec.of(query, value, params))
    if key.shape[2] != current.num_keys:
        reason = "their keys are not those of this pass"
    elif not (key.dtype == value.dtype == query.dtype and key.stride(3) == value.stride(3) == 1):
        reason = "their keys have another dtype than the queries, or are not contiguous"
    if reason is None:
        return current.backend.attention(query, key, value, current.metadata(query.device), params), None
    warn_dense_fallback(current.backend.name, reason)
    mask_function = causal_mask_function if params.window is None else _window_mask(params.window)
    return None, current.bias(mask_function, params.window, query.dtype, query.device)


def _attention(
    current: TreePass, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    indices: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Map queries `[batch, heads, nodes, dim]` to `[batch, nodes, heads, dim]` by the running pass.

    `indices` `[batch, nodes, selected]` are the keys that an indexer selected; there the mask is dense.
    """
    if unknown := _ARGUMENTS_BY_ORDER & kwargs.keys():
        raise UnsupportedTargetError(
            f"{type(module).__name__} gives its attention {', '.join(sorted(unknown))}, which follow the order of keys and not "
            "their positions, so medhead cannot verify trees with it"
        )
    if indices is not None:
        attention_mask = _selected(attention_mask, indices)
    needs_reference = softcap is not None or s_aux is not None  # SDPA supports neither
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if current.visits is not None:
        with torch._C.DisableTorchFunction():  # no row of it depends on another
            return node_attention.attention(
                current.visits, query, key, value, attention_mask, scale, softcap, s_aux
            ), None
    if attention_mask is not None and attention_mask.shape[0] == 0:
        params = AttnParams(scale, attention_mask.shape[3] or None, softcap, s_aux)
        out, attention_mask = _backend_attention(current, query, key, value, params)
        if out is not None:
            return out, None
    needs_reference = needs_reference or current.use_reference
    nodes, keys = query.shape[2], key.shape[2]
    if attention_mask is None and nodes > 1 and (needs_reference or (keys > nodes and not is_supported(query, value))):
        visible = torch.ones(nodes, keys, dtype=torch.bool, device=query.device).tril(keys - nodes)
        attention_mask = additive_mask(visible, torch.float32 if needs_reference else query.dtype)
    if not needs_reference:
        return sdpa.attention(query, key, value, attention_mask, scale), None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = additive_mask(attention_mask, torch.float32)
    return reference.attention(query, key, value, attention_mask, scale, softcap, s_aux), None


def _selected(mask: Tensor | None, indices: Tensor) -> Tensor:
    """Return a dense mask in which also the keys are hidden that are not among `indices` `[batch, nodes, selected]`."""
    assert mask is not None, "an indexer reads a dense mask"
    hidden = torch.ones(*indices.shape[:2], mask.shape[-1], dtype=torch.bool, device=mask.device)
    hidden = hidden.scatter_(-1, indices.long(), False)[:, None]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


@contextmanager
def attention_names(configs: list[Any], names: list[str]) -> Iterator[None]:
    """Set the names of the attention functions of configurations inside the context."""
    before = [config._attn_implementation for config in configs]
    try:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@lru_cache(maxsize=64)
def attention_name(own: str | None) -> str:
    """Return the name of the attention for trees, registered now, for a configuration whose attention is called `own`.

    Without a running pass in the calling thread it is `own`.
    """
    own = own or "eager"
    if own.startswith(NAME):
        return own
    name = f"{NAME}_{own.replace('flash', 'fa')}"  # transformers prepares other inputs for names with "flash"

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = _running.get()
        if current is None:
            if kwargs.get("indices") is not None and own in ("eager", "sdpa"):  # the model leaves this to other names
                args = (*args[:3], _selected(args[3], kwargs.pop("indices")), *args[4:])
            return _own_attention(cast(Hashable, type(module)), own)(module, *args, **kwargs)
        if current.scale_floor is not None and current.num_keys >= current.scale_floor:
            args = (rescale_query(module, args[0], current), *args[1:])
        return _attention(current, module, *args, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        current = _running.get()
        if current is not None:
            return _mask(current, kwargs)
        masks = AttentionMaskInterface()
        return masks[own](*args, **kwargs) if own in masks else kwargs.get("attention_mask")

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


@lru_cache(maxsize=256)
def _own_attention(kind: type, name: str) -> Callable[..., Any]:
    """Return the attention function that modules of a class call for a name; `eager` is a function of the modeling file."""
    forwards = [inspect.unwrap(base.__dict__["forward"]) for base in kind.__mro__ if "forward" in base.__dict__]
    for forward in filter(inspect.isfunction, forwards):
        scope, used = forward.__globals__, forward.__code__.co_names
        if name != "eager" and "ALL_ATTENTION_FUNCTIONS" in used:
            return scope["ALL_ATTENTION_FUNCTIONS"][name]
        found = [scope[each] for each in used if each.endswith("eager_attention_forward") and each in scope]
        if name == "eager" and found:
            return found[0]
    if name != "eager":
        return AttentionInterface()[name]
    raise MedheadError(
        f"{kind.__name__} was called in one thread while a decoder runs in another, and its eager attention function was "
        "not found; load the model with attn_implementation='sdpa', or call it after the decoder"
    )
