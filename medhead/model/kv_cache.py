"""Key/value storage for trees: preallocated, ragged rows, and `commit`, which keeps the accepted path.

A pass writes the rows of all nodes behind the committed prefix of their batch row, at `length + node`. `commit` moves the
rows of the accepted nodes to `length + depth` and advances the lengths; everything behind is free again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

PAGE = 64  # rows are allocated in multiples of this


@dataclass(frozen=True)
class KVSpec:
    """Shape of one layer's keys or values: heads, size of a head, type, and the device they live on."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device


KVBuffers = dict[KVSpec, Any]  # `[slots, batch, heads, tokens, dim]` of every shape, or a list of its slots


@dataclass(frozen=True)
class CacheLayout:
    """What a target caches: for every layer with a cache of its own, the slots of its keys and values."""

    layers: dict[int, tuple[KVSpec, KVSpec]]

    def slots(self) -> dict[KVSpec, int]:
        """Every shape, in the order of `TreeCache.stores`, and how many layers' keys or values have it."""
        return _places_of(self)[1]

    def bytes_per_token(self) -> int:
        """Memory of one token of one row."""
        return sum(slot.heads * slot.dim * slot.dtype.itemsize for pair in self.layers.values() for slot in pair)


class TreeCache(Cache):
    """Storage for `batch` rows. All slots of one shape share a tensor, so that `commit` is one copy for all layers.

    Args:
        layout: what the target caches, as found by probing it.
        batch: number of rows.
        capacity: tokens a row is expected to hold; the storage doubles when that was too few.
    """

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        capacity = -(-capacity // PAGE) * PAGE
        stores = {
            slot: torch.zeros(n, batch, slot.heads, capacity, slot.dim, dtype=slot.dtype, device=slot.device)
            for slot, n in layout.slots().items()
        }
        self._hold(layout, stores)
        self.lengths = [0] * batch  # committed tokens of every row, on the host

    @classmethod
    def over(cls, layout: CacheLayout, stores: KVBuffers) -> TreeCache:
        """A cache over storage that is there already, as `stores` of another gives it; only the device knows its lengths.

        Storage may be taken apart (`store.unbind()`): a compiler that sees one tensor change in many places copies all of it.
        """
        cache = cls.__new__(cls)
        cache._hold(layout, stores)
        cache.lengths = [0]
        return cache

    def _hold(self, layout: CacheLayout, stores: KVBuffers) -> None:
        super().__init__(layers=[])
        self.layout, self._stores = layout, stores
        self.capacity: int = next(iter(stores.values()))[0].shape[2]
        self._places = _places_of(layout)[0]
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._parts: list[Tensor] = []  # see `parts`
        self._refresh_views()
        self._nodes = 0
        self._used = 0
        self._start: int | None = 0  # where this pass writes, if that is the same in all rows
        self._rows_index: dict[torch.device, Tensor] = {}

    # ---------------------------------------------------------------- one pass

    def begin(self, nodes: int, spare: int = 0) -> None:
        """Prepare a pass over `nodes` nodes behind the committed prefix of every row; grows the storage if needed.

        Args:
            nodes: of every row.
            spare: columns that are to be left behind the nodes of the longest row.
        """
        longest = max(self.lengths)
        self._nodes, self._used = nodes, longest + nodes
        self._start = longest if min(self.lengths) == longest else None
        if self._used + spare > self.capacity:
            self._grow(self._used + spare)
        if self._start is None:
            where = torch.tensor(self.lengths)[:, None] + torch.arange(nodes)  # [batch, nodes]
            devices = {slot.device for slot in self._stores}
            self._rows_index = {device: where.to(device)[:, None, :, None] for device in devices}

    def begin_at(self, lengths: Tensor, nodes: int, columns: int | None = None) -> None:
        """Prepare a pass behind prefixes whose lengths `[batch]` only the device knows.

        Attention sees so many columns, all if None. There must be room for the nodes: nobody looks.
        """
        self._nodes, self._used, self._start = nodes, self.capacity if columns is None else columns, None
        where = (lengths[:, None] + torch.arange(nodes, device=lengths.device))[:, None, :, None]
        self._rows_index = {device: where.to(device) for device in {slot.device for slot in self._stores}}

    def commit_at(self, lengths: Tensor, path: Tensor, counts: Tensor) -> None:
        """`commit` after `begin_at`: lengths and counts `[batch]` stay on the device, and the caller adds one to the other."""
        for slot, store in self._stores.items():
            on_slot = path.to(slot.device), lengths.to(slot.device)
            if isinstance(store, list):
                for part in store:
                    _move_rows(part[None], *on_slot)
            elif use_triton_commit(slot.device):
                from medhead_kernels import ops

                ops.move(store, *on_slot, counts.to(slot.device))
            else:
                _move_rows(store, *on_slot)

    @property
    def stores(self) -> KVBuffers:
        """`[slots, batch, heads, capacity, dim]` of every shape."""
        return self._stores

    @property
    def parts(self) -> list[Tensor]:
        """`[batch, heads, capacity, dim]` of every layer's keys and values, in the order of `stores`."""
        if not self._parts:
            self._parts = [part for store in self._stores.values() for part in store]
        return self._parts

    @property
    def used(self) -> int:
        """Columns of keys that attention sees in the pass that was begun: longest prefix plus nodes."""
        return self._used

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values of this pass; return views of all keys and values of the layer.

        Args:
            key_states: `[batch, key_heads, nodes, dim]`.
            value_states: `[batch, key_heads, nodes, value_dim]`.
            layer_idx: which layer.
            args: unused.
            kwargs: unused.
        """
        keys, values = self._views[layer_idx]
        if self._start is not None:
            end = self._start + self._nodes
            keys[:, :, self._start : end] = key_states
            values[:, :, self._start : end] = value_states
        else:
            index = self._rows_index[keys.device]
            keys.scatter_(2, index.expand_as(key_states), key_states.to(keys.dtype))
            values.scatter_(2, index.expand_as(value_states), value_states.to(values.dtype))
        return keys[:, :, : self._used], values[:, :, : self._used]

    def commit(self, counts: list[int], path: Tensor | None = None) -> None:
        """Keep the accepted nodes of the last pass.

        Args:
            counts: how many nodes of each row stay.
            path: `[batch, steps]` int64, the node to keep at each depth, starting with the root, node 0 (what lies behind
                `counts` does not matter), or None when the nodes to keep are the first ones in order, which moves nothing.
        """
        if path is not None and path.shape[1] > 1:
            for slot, store in self._stores.items():
                by_kernel, here = use_triton_commit(slot.device), path.to(slot.device)
                if not by_kernel and self._start is not None and len(path) == 1:
                    _move_few(store, here[0], self._start)
                else:
                    move = _move_by_kernel if by_kernel else _move_rows
                    move(store, here, torch.tensor(self.lengths, device=slot.device))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all batch rows but these (rows that finished early), in this order.

        Where rows from behind close the gaps only they are moved, until half of the storage is unused.
        """
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        in_place = all(row >= len(rows) for _, row in moves)
        for slot, store in self._stores.items():
            if in_place and 2 * len(rows) > store.stride(0) // max(store.stride(1), 1):
                for place, row in moves:
                    length = self.lengths[row]
                    store[:, place, :, :length] = store[:, row, :, :length]
                self._stores[slot] = store[:, : len(rows)]
            else:
                self._stores[slot] = store[:, torch.tensor(rows, device=store.device)]
        self.lengths = [self.lengths[row] for row in rows]
        self._refresh_views()

    def join(self, other: TreeCache) -> None:
        """Put the rows of another cache of this layout behind these; the other one is used up."""
        here, there = max(self.lengths), max(other.lengths)
        # what long rows that left had needed is given back
        capacity = max(other.capacity, -(-(here + PAGE) // PAGE) * PAGE)
        rows = len(self.lengths)
        for slot, store in self._stores.items():
            joined = store.new_zeros(store.shape[0], rows + len(other.lengths), slot.heads, capacity, slot.dim)
            joined[:, :rows, :, :here] = store[:, :, :, :here]
            joined[:, rows:, :, :there] = other._stores.pop(slot)[:, :, :, :there]
            self._stores[slot] = joined
        self.capacity = capacity
        self.lengths = self.lengths + other.lengths
        self._refresh_views()

    def nbytes(self) -> int:
        """Memory of the storage, rows that were dropped included until it is made anew."""
        return sum(store.untyped_storage().nbytes() for store in self._stores.values())

    # ---------------------------------------------------------------- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of keys in this pass, and the offset of the first."""
        return self._used, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No fixed maximum."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops keys; windows are a matter of the mask."""
        return [False] * (max(self.layout.layers) + 1)

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile on its own; it may not."""
        return False

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __len__(self) -> int:
        return max(self.layout.layers) + 1

    # ---------------------------------------------------------------- storage

    def _refresh_views(self) -> None:
        self._parts = []
        for layer, ((key_slot, key_at), (value_slot, value_at)) in self._places.items():
            self._views[layer] = (self._stores[key_slot][key_at], self._stores[value_slot][value_at])

    def _grow(self, needed: int) -> None:
        grown = max(2 * self.capacity, -(-needed // PAGE) * PAGE)
        for slot, store in self._stores.items():
            bigger = store.new_zeros(*store.shape[:3], grown, slot.dim)
            bigger[:, :, :, : self.capacity] = store
            self._stores[slot] = bigger
        self.capacity = grown
        self._refresh_views()


def compact_order(rows: list[int]) -> list[int]:
    """The same rows in the order that `TreeCache.keep_rows` moves the fewest for: the last ones stand where others have left."""
    kept, behind = set(rows), [row for row in rows if row >= len(rows)]
    return [row if row in kept else behind.pop() for row in range(len(rows))]


def _places_of(
    layout: CacheLayout,
) -> tuple[dict[int, tuple[tuple[KVSpec, int], tuple[KVSpec, int]]], dict[KVSpec, int]]:
    """Where every layer's keys and values lie: a shape and a place in its storage; and how many places each shape has."""
    found: dict[int, tuple[tuple[KVSpec, int], tuple[KVSpec, int]]] = {}
    counts: dict[KVSpec, int] = {}
    for layer, pair in layout.layers.items():
        places = []
        for slot in pair:
            places.append((slot, counts.get(slot, 0)))
            counts[slot] = counts.get(slot, 0) + 1
        found[layer] = (places[0], places[1])
    return found, counts


def _move_few(store: Tensor, path: Tensor, start: int) -> None:
    """Copy the rows `start + path[d]` of a store `[slots, 1, heads, tokens, dim]` to `start + d`."""
    store[:, :, :, start : start + len(path)] = store.index_select(3, path + start)


def _move_rows(store: Tensor, path: Tensor, lengths: Tensor) -> None:
    """Copy the rows `length + path[d]` of a store `[slots, batch, heads, tokens, dim]` to `length + d`."""
    batch, steps = path.shape
    shape = (store.shape[0], batch, store.shape[2], steps, store.shape[4])
    source = (lengths[:, None] + path)[None, :, None, :, None].expand(shape)
    goal = (lengths[:, None] + torch.arange(steps, device=path.device))[None, :, None, :, None].expand(shape)
    store.scatter_(3, goal, store.gather(3, source))


def _move_by_kernel(store: Tensor, path: Tensor, lengths: Tensor) -> None:
    """The same in one launch and in place."""
    from medhead_kernels.commit import move

    move(store, path, lengths)


@lru_cache(maxsize=8)
def use_triton_commit(device: torch.device) -> bool:
    """Whether `commit` moves rows by the Triton kernel: on CUDA, where Triton is installed and does it rightly."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return selftest_commit(device)


def selftest_commit(device: torch.device) -> bool:
    """Try the kernel on four rows; a kernel that fails here (no compiler, say) gives way, out loud."""
    try:
        store = torch.arange(4.0, device=device).repeat_interleave(16).view(1, 1, 1, 4, 16)
        _move_by_kernel(store, torch.tensor([[0, 2]], device=device), torch.tensor([1], device=device))
        found = store[0, 0, 0, :, 0].tolist()
        if found == [0, 1, 3, 3]:
            return True
        reason = f"rows 0 to 3 became {found}"
    except Exception as error:  # whatever Triton throws, plain copies work
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    warnings.warn(
        f"the commit kernel does not work on {device} ({reason}); rows are moved by PyTorch, slower", stacklevel=2
    )
    return False
