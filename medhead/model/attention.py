"""The attention function and the mask that a target uses while it verifies trees.

transformers lets a model's attention be replaced by name (`AttentionInterface`) and its mask as well
(`AttentionMaskInterface`). The mask function is handed each layer's own rule (causal, sliding window, chunks) as a
predicate on positions; here it is evaluated on the positions of tree nodes and combined with "is it an ancestor?". So
every rule that transformers can say holds for trees, and no modeling file is copied or patched.

A kernel backend (`medhead_kernels.backends`) needs no dense mask. A layer whose rule it knows, causal or sliding window, is
given an empty tensor as its mask, whose last size is the window; every other layer keeps its dense mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from medhead_kernels import reference, sdpa
from medhead_kernels.attn_metadata import Scoring, TreeColumns
from medhead_kernels.backends import Backend, Case, refusal

NAME = "medhead"


@dataclass
class TreePass:
    """What attention needs to know of the pass that is running.

    Attributes:
        lengths: `[batch]` int64, committed tokens of every row, or None when all rows have `longest`.
        longest: the largest of them, on the host; more where only the device knows them.
        depth: `[batch or 1, nodes]`, depth of every node.
        visible: `[batch or 1, nodes, nodes]` bool, node i sees node j; None for a chain.
        nodes: nodes in this pass.
        plain: use the reference attention throughout, for comparison.
        backend: a kernel backend for the layers that it can serve, or None.
        host_lengths: committed tokens of every row, on the host; empty where only the device knows them.
        words: ancestor words of the nodes; needed by a backend.
    """

    lengths: Tensor | None
    longest: int
    depth: Tensor
    visible: Tensor | None
    nodes: int
    plain: bool = False
    backend: Backend | None = None
    host_lengths: tuple[int, ...] = ()
    words: Tensor | None = None
    _biases: dict[Any, Tensor] = field(default_factory=dict)
    _columns: dict[torch.device, TreeColumns] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Columns of keys: longest prefix plus nodes."""
        return self.longest + self.nodes

    def columns(self, device: torch.device) -> TreeColumns:
        """What the key columns are, for a backend, on a layer's device."""
        if device not in self._columns:
            assert self.words is not None, "a pass with a backend has ancestor words"
            if self.host_lengths:
                lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device=device)
            else:
                assert self.lengths is not None, "somebody knows the lengths"
                lengths = self.lengths.to(device, torch.int32)
            self._columns[device] = TreeColumns(
                lengths, self.host_lengths, self.words.to(device), self.depth.to(device)
            )
        return self._columns[device]

    def bias(self, rule: Callable, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The additive mask `[batch or 1, 1, nodes, keys]` for one rule, or None where plain attention is the same.

        None means: one node sees everything, several nodes are causal.
        """
        plain = rule is causal_mask_function or (window is not None and self.keys <= window)
        chain = self.visible is None
        if plain and self.lengths is None and chain and (self.nodes == 1 or self.longest == 0):
            return None
        key = (None if plain else rule, dtype, device)
        if key not in self._biases:
            seen = self._seen(device) if plain else self._seen(device) & self._allowed(rule, device)
            bias = torch.zeros(seen.shape, dtype=dtype, device=device)
            self._biases[key] = bias.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        return self._biases[key]

    def _seen(self, device: torch.device) -> Tensor:
        """`[batch or 1, nodes, keys]`: key is in the row's prefix, or is the node's ancestor or itself."""
        nodes, keys = self.nodes, self.keys
        tree = self.visible
        if tree is None:
            tree = torch.ones(nodes, nodes, dtype=torch.bool, device=device).tril()[None]
        tree = tree.to(device)
        if self.lengths is None:
            return torch.nn.functional.pad(tree, (self.longest, 0), value=True)
        lengths = self.lengths.to(device)
        seen = (torch.arange(keys, device=device) < lengths[:, None])[:, None].repeat(1, nodes, 1)
        where = lengths[:, None, None] + torch.arange(nodes, device=device)
        tree = tree.expand(lengths.shape[0], nodes, nodes)  # `len` would fix the batch of a recorded pass
        return seen.scatter_(2, where.expand_as(tree), tree)

    def _allowed(self, rule: Callable, device: torch.device) -> Tensor:
        """The layer's own rule, evaluated on positions: `[batch or 1, nodes, keys]`."""
        keys = self.keys
        lengths = torch.tensor([self.longest]) if self.lengths is None else self.lengths
        lengths = lengths.to(device)[:, None]
        queries = lengths + self.depth.to(device)  # [batch, nodes]
        batch = queries.shape[0]
        positions = torch.arange(keys, device=device).repeat(batch, 1)
        where = (lengths + torch.arange(self.nodes, device=device)).expand(batch, -1)
        positions.scatter_(1, where, queries.expand(batch, -1))
        rows = torch.arange(batch, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        allowed = rule(rows, head, queries[:, None, :, None], positions[:, None, None, :])
        return allowed.expand(batch, 1, self.nodes, keys)[:, 0]


_running: ContextVar[TreePass | None] = ContextVar("medhead_pass", default=None)


@contextmanager
def tree_pass(current: TreePass) -> Iterator[None]:
    """Make a pass the running one for this thread."""
    token = _running.set(current)
    try:
        yield
    finally:
        _running.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function of transformers: an additive mask for the running tree pass."""
    current = _running.get()
    if current is None:
        return sdpa_mask(*args, **kwargs)
    device = torch.device(kwargs.get("device") or current.depth.device)
    rule, window = kwargs.get("mask_function", causal_mask_function), kwargs.get("local_size")
    if current.backend is not None:
        known = rule_window(rule)
        if known is not None:
            return _note(current, known, device)
    return current.bias(rule, window, kwargs.get("dtype", torch.float32), device)


def rule_window(rule: Callable) -> int | None:
    """What transformers' rule hides besides the future: 0 for nothing, the size of a sliding window, None for anything else."""
    if rule is causal_mask_function:
        return 0
    inside = _closure(rule)
    parts = inside.get("mask_functions", ())
    if not _made_alike(rule, _WINDOW_RULE) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _closure(parts[0]).get("sliding_window")
    alike = _made_alike(parts[0], _closure(_WINDOW_RULE)["mask_functions"][0])
    return window if alike and isinstance(window, int) and window > 0 else None


_WINDOW_RULE = sliding_window_causal_mask_function(1)
window_rule = lru_cache(maxsize=8)(sliding_window_causal_mask_function)


def _closure(function: Callable) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return (
        {} if code is None else dict(zip(code.co_freevars, (cell.cell_contents for cell in cells or ()), strict=True))
    )


def _made_alike(one: Callable, other: Callable) -> bool:
    code = getattr(one, "__code__", None)
    return code is not None and code is getattr(other, "__code__", None)


def _note(current: TreePass, window: int, device: torch.device) -> Tensor:
    """A mask of no elements: "the backend knows"; its last size is the window, 0 where none hides a key."""
    return torch.empty(0, 1, current.nodes, 0 if current.keys <= window else window, device=device)


@lru_cache(maxsize=64)
def _say_once(name: str, reason: str) -> None:
    warnings.warn(
        f"attention {name!r} cannot serve some layers of this model ({reason}); "
        "they go through the slower dense mask (sdpa, or reference for soft-capping and sinks)",
        stacklevel=2,
    )


def _by_backend(
    current: TreePass, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> tuple[Tensor | None, Tensor | None]:
    """The backend's output, or None and the dense mask for a layer that it cannot serve."""
    assert current.backend is not None, "only a pass with a backend writes notes"
    reason = refusal(current.backend.name, Case.of(query, value, scoring))
    if key.shape[2] != current.keys:
        reason = "it reads keys that are not this pass's"
    elif not (key.dtype == value.dtype == query.dtype and key.stride(3) == value.stride(3) == 1):
        reason = "its keys have another type or layout"
    if reason is None:
        return current.backend.attention(query, key, value, current.columns(query.device), scoring), None
    _say_once(current.backend.name, reason)
    rule = causal_mask_function if scoring.window is None else window_rule(scoring.window)
    return None, current.bias(rule, scoring.window, query.dtype, query.device)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: query `[batch, heads, nodes, dim]` to `[batch, nodes, heads, dim]`."""
    current = _running.get()
    special = softcap is not None or s_aux is not None  # what PyTorch's kernels cannot do
    if current is None and not special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if current is not None and attention_mask is not None and attention_mask.shape[0] == 0:
        scoring = Scoring(scale, attention_mask.shape[3] or None, softcap, s_aux)
        out, attention_mask = _by_backend(current, query, key, value, scoring)
        if out is not None:
            return out, None
    if current is not None and not special and not current.plain:
        return sdpa.attention(query, key, value, attention_mask, scale), None
    if attention_mask is None and query.shape[2] > 1:
        nodes, keys = query.shape[2], key.shape[2]
        hidden = torch.ones(nodes, keys, dtype=torch.bool, device=query.device).triu(1 + keys - nodes)
        attention_mask = torch.zeros(nodes, keys, device=query.device).masked_fill_(
            hidden, torch.finfo(torch.float32).min
        )
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=torch.float32).masked_fill_(
            ~attention_mask, torch.finfo(torch.float32).min
        )
    return reference.attention(query, key, value, attention_mask, scale, softcap, s_aux), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
