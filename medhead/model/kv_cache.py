"""Key/value storage for trees: preallocated, ragged rows, and `commit`, which keeps the accepted path.

A pass writes the keys and values of all nodes after the committed prefix of their row, at `length + node`. `commit` moves
those of the accepted nodes to `length + depth`; everything after the new length is free again.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from medhead.core.lengths import Lengths
from medhead.errors import one_line
from medhead_kernels.cache_ops import move_layers, move_rows, write_rows

PAGE = 64  # rows are allocated in multiples of this


@dataclass(frozen=True)
class KVSpec:
    """Shape of one layer's keys or values: heads, size of a head, type, and device."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, states: Tensor) -> KVSpec:
        """Return the shape of cached keys or values `[batch, heads, tokens, dim]`."""
        return cls(states.shape[1], states.shape[3], states.dtype, states.device)


KVBuffers = dict[KVSpec, Any]  # `[layers, batch, heads, tokens, dim]` of every shape, or a list with an item per layer


@dataclass(frozen=True)
class CacheLayout:
    """What a target caches: the shapes of keys and values of every layer with a cache of its own.

    Attributes:
        layers: keys and values by layer.
        indexers: by layer, the keys with which it selects the tokens that it attends to (DeepSeek Sparse Attention).
    """

    layers: dict[int, tuple[KVSpec, KVSpec]]
    indexers: dict[int, KVSpec] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache) -> CacheLayout:
        """Return what the layers of a cache of transformers hold."""
        layers: dict[int, tuple[KVSpec, KVSpec]] = {}
        indexers: dict[int, KVSpec] = {}
        for index, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == values.ndim == 4:
                layers[index] = KVSpec.of(keys), KVSpec.of(values)
            indexer = getattr(layer, "indexer_keys", None)
            if isinstance(indexer, Tensor) and indexer.ndim == 3:
                indexers[index] = KVSpec.of(indexer[:, None])
        return cls(layers, indexers)

    def all_specs(self) -> list[KVSpec]:
        """Return the shape of everything that is cached, in the order of `TreeCache.per_layer` within a shape."""
        return [*(spec for pair in self.layers.values() for spec in pair), *self.indexers.values()]

    def specs(self) -> dict[KVSpec, int]:
        """Return every shape, in the order of `TreeCache.buffers`, and how many layers' keys or values have it."""
        return dict(Counter(self.all_specs()))

    def bytes_per_token(self) -> int:
        """Return the memory of one token of one row."""
        return sum(spec.heads * spec.dim * spec.dtype.itemsize for spec in self.all_specs())


class TreeCache(Cache):
    """Storage for a batch of rows. All layers of one shape share a tensor, so that `commit` is one copy for all of them.

    The storage doubles when `capacity`, the tokens that a row is expected to hold, was too small.

    Attributes:
        lengths: committed tokens of every row.
        buffers: `[layers, batch, heads, capacity, dim]` of every shape.
        per_layer: `[batch, heads, capacity, dim]` of every layer's keys and values, in the order of `buffers`.
        used: columns of keys that attention sees in the pass that was begun.
        position_offset: `[..., batch]` int64, what is added to a token's index to get its position, or one for each dimension
            of positions, where a prompt holds images; None where the position is the index.
        columns: how many columns attention sees; None for the longest prefix and the nodes, or, where the host does not know
            the lengths, for all of them.
    """

    def __init__(self, layout: CacheLayout, batch: int, capacity: int) -> None:
        capacity = -(-capacity // PAGE) * PAGE
        buffers = {
            spec: torch.zeros(n, batch, spec.heads, capacity, spec.dim, dtype=spec.dtype, device=spec.device)
            for spec, n in layout.specs().items()
        }
        device = next((buffer.device for buffer in buffers.values()), torch.device("cpu"))
        self._hold(layout, buffers, Lengths.of([0] * batch, device))

    @classmethod
    def from_buffers(cls, layout: CacheLayout, buffers: KVBuffers, lengths: Lengths) -> TreeCache:
        """Return a cache over existing storage, as `buffers` of another cache gives it.

        With a list of tensors per layer the cache is changed by operators that a compiler does not make copies for.
        """
        cache = cls.__new__(cls)
        cache._hold(layout, buffers, lengths)
        return cache

    def _hold(self, layout: CacheLayout, buffers: KVBuffers, lengths: Lengths) -> None:
        Cache.__init__(self, layers=[])
        self.layout, self.buffers, self.lengths = layout, buffers, lengths
        unlimited = 1 << 30  # without attention
        self.capacity: int = next((buffer[0].shape[2] for buffer in buffers.values()), unlimited)
        self.columns: int | None = None
        self.position_offset: Tensor | None = None
        self._traced = any(isinstance(buffer, list) for buffer in buffers.values())
        self._refresh_views()
        self.used = 0
        self._start: int | None = 0  # where this pass writes, if that is the same in all rows
        self._rows_index: dict[torch.device, Tensor] = {}

    # ---------------------------------------------------------------- one pass

    def begin(self, nodes: int, spare: int = 0) -> None:
        """Prepare a pass over `nodes` nodes after the committed prefix of every row.

        The storage grows where the host knows the lengths, for `spare` columns after the longest row's nodes too; elsewhere
        there must be room.
        """
        self._start, self._rows_index = None, {}
        if self.lengths.host is None:
            self.used = self.capacity if self.columns is None else self.columns
        else:
            longest = self.lengths.longest
            self.used = longest + nodes
            if self.used + spare > self.capacity:
                self._grow(self.used + spare)
            if self.lengths.uniform:
                self._start = longest
                return
        device = self.lengths.device.device
        where = (self.lengths.device[:, None] + torch.arange(nodes, device=device))[:, None, :, None]
        self._rows_index = {device: where.to(device) for device in {spec.device for spec in self.buffers}}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's keys and values `[batch, heads, nodes, dim]` of this pass; return views of all that it has.

        Keys with an attribute `medhead_rope`, of queries, cosines and sines, are rotated, and so are the queries, in place.
        """
        keys, values = self._views[layer_idx]
        if (rope := getattr(key_states, "medhead_rope", None)) is not None:
            from medhead_kernels.fused_ops import rope_write

            rope_write(rope[0], key_states, value_states, *rope[1:], self._node_rows(keys.device), keys, values)
        elif self._start is not None:
            keys[:, :, self._start : self.used] = key_states
            values[:, :, self._start : self.used] = value_states
        else:
            index = self._rows_index[keys.device]
            if self._traced:
                write_rows(keys, values, key_states, value_states, index)
            else:
                keys.scatter_(2, index.expand_as(key_states), key_states.to(keys.dtype))
                values.scatter_(2, index.expand_as(value_states), value_states.to(values.dtype))
        return keys[:, :, : self.used], values[:, :, : self.used]

    def _node_rows(self, device: torch.device) -> Tensor:
        """Return the row of every node of this pass, `[batch or 1, nodes]`."""
        if device not in self._rows_index:
            assert self._start is not None
            self._rows_index[device] = torch.arange(self._start, self.used, device=device)[None, None, :, None]
        return self._rows_index[device][:, 0, :, 0]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store the keys `[batch, nodes, dim]` of one layer's indexer of this pass; return a view of all that it has."""
        held, given = self._indexers[layer_idx], indexer_key_states[:, None]
        if self._start is not None:
            held[:, :, self._start : self.used] = given
        else:
            held.scatter_(2, self._rows_index[held.device].expand_as(given), given.to(held.dtype))
        return held[:, 0, : self.used]

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Move the accepted nodes of the last pass into place; the caller advances `lengths` afterwards.

        `path` `[batch, steps]` int64 is the node at each depth, starting with the root, and arbitrary beyond `counts`
        `[batch]` int64, the number of nodes of each row that stay.
        """
        if path.shape[1] == 1:
            return
        for spec, buffer in self.buffers.items():
            here, lengths = path.to(spec.device), self.lengths.device.to(spec.device)
            by_kernel = use_triton_commit(spec.device)
            if isinstance(buffer, list):
                move_layers(buffer, here, lengths, counts.to(spec.device), by_kernel)
            elif by_kernel:
                from medhead_kernels import commit

                commit.move(buffer, here, lengths, counts.to(spec.device))
            elif self._start is not None and len(path) == 1:
                buffer[:, :, :, self._start : self._start + path.shape[1]] = buffer.index_select(
                    3, here[0] + self._start
                )
            else:
                move_rows(buffer, here, lengths)

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these (of sequences that ended), in this order; the caller does the same to `lengths`.

        Where the last rows fill the gaps only they are moved, until half of the storage is unused.
        """
        assert self.lengths.host is not None
        moves = [(place, row) for place, row in enumerate(rows) if place != row]
        in_place = all(row >= len(rows) for _, row in moves)
        for spec, buffer in self.buffers.items():
            if in_place and 2 * len(rows) > buffer.stride(0) // max(buffer.stride(1), 1):
                for place, row in moves:
                    length = self.lengths.host[row]
                    buffer[:, place, :, :length] = buffer[:, row, :, :length]
                self.buffers[spec] = buffer[:, : len(rows)]
            else:
                self.buffers[spec] = buffer[:, torch.tensor(rows, device=buffer.device)]
        if self.position_offset is not None:
            offset = self.position_offset[..., rows]
            self.position_offset = offset if bool(offset.any()) else None
        self._refresh_views()

    def join(self, other: TreeCache) -> None:
        """Append the rows of another cache of this layout, which is used up; the caller does the same to `lengths`."""
        here, there = self.lengths.longest, other.lengths.longest
        # what long rows that left had needed is given back
        capacity = max(other.capacity, -(-(here + PAGE) // PAGE) * PAGE)
        rows, more = self.batch_size, other.batch_size
        for spec, buffer in self.buffers.items():
            joined = buffer.new_zeros(buffer.shape[0], rows + more, spec.heads, capacity, spec.dim)
            joined[:, :rows, :, :here] = buffer[:, :, :, :here]
            joined[:, rows:, :, :there] = other.buffers.pop(spec)[:, :, :, :there]
            self.buffers[spec] = joined
        self.capacity = capacity
        self.position_offset = _join_offsets(self.position_offset, rows, other.position_offset, more)
        self._refresh_views()

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """Return copies `[layers, heads, end - begin, dim]` of every shape's keys and values of these tokens of a row."""
        return [torch.stack([layer[row, :, begin:end] for layer in buffer]) for buffer in self.buffers.values()]

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """Take what `copy_tokens` returned as the first tokens of a row; the caller sets `lengths`."""
        for buffer, part in zip(self.buffers.values(), parts, strict=False):
            buffer[:, row, :, : part.shape[2]] = part

    def nbytes(self) -> int:
        """Return the memory of the storage, dropped rows included until it is made anew."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers.values())

    # ---------------------------------------------------------------- what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the committed tokens of the longest row; 0 where the host does not know them (positions are given)."""
        return 0 if self.lengths.host is None else self.lengths.longest

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the columns of keys in this pass, and the offset of the first."""
        return self.used, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no fixed maximum."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """Return False for every layer: no layer drops keys, windows are a matter of the mask."""
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        """Return False: transformers may not compile on its own."""
        return False

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths.device)

    def __len__(self) -> int:
        return max(self.layout.layers, default=-1) + 1

    # ---------------------------------------------------------------- storage

    def _refresh_views(self) -> None:
        parts = {spec: [buffer[index] for index in range(len(buffer))] for spec, buffer in self.buffers.items()}
        self.per_layer: list[Tensor] = [layer for layers in parts.values() for layer in layers]
        left = {spec: iter(layers) for spec, layers in parts.items()}
        self._views = {
            layer: (next(left[key]), next(left[value])) for layer, (key, value) in self.layout.layers.items()
        }
        self._indexers = {layer: next(left[spec]) for layer, spec in self.layout.indexers.items()}

    def _grow(self, needed: int) -> None:
        grown = max(2 * self.capacity, -(-needed // PAGE) * PAGE)
        for spec, buffer in self.buffers.items():
            bigger = buffer.new_zeros(*buffer.shape[:3], grown, spec.dim)
            bigger[:, :, :, : self.capacity] = buffer
            self.buffers[spec] = bigger
        self.capacity = grown
        self._refresh_views()


def _join_offsets(here: Tensor | None, rows: int, there: Tensor | None, more: int) -> Tensor | None:
    """Return the position offsets of two batches of `rows` and `more` rows as one."""
    like = here if here is not None else there
    if like is None:
        return None
    here = like.new_zeros(*like.shape[:-1], rows) if here is None else here
    there = like.new_zeros(*like.shape[:-1], more) if there is None else there
    return torch.cat([here, there], -1)


def compact_order(rows: list[int]) -> list[int]:
    """Return the rows in the order for which `TreeCache.keep_rows` moves the fewest: the last ones fill the gaps."""
    kept, spare = set(rows), [row for row in rows if row >= len(rows)]
    return [row if row in kept else spare.pop() for row in range(len(rows))]


@lru_cache(maxsize=8)
def use_triton_commit(device: torch.device) -> bool:
    """Return whether `commit` uses the Triton kernel: on CUDA, where Triton is installed and passes `selftest_commit`."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return selftest_commit(device)


def selftest_commit(device: torch.device) -> bool:
    """Try the kernel on four rows; warn and return False if it fails (without a compiler, for example)."""
    try:
        from medhead_kernels.commit import move

        buffer = torch.arange(4.0, device=device).repeat_interleave(16).view(1, 1, 1, 4, 16)
        move(buffer, torch.tensor([[0, 2]], device=device), torch.tensor([1], device=device))
        found = buffer[0, 0, 0, :, 0].tolist()
        if found == [0, 1, 3, 3]:
            return True
        reason = f"rows 0 to 3 became {found}"
    except Exception as error:  # whatever Triton throws, plain copies work
        reason = one_line(f"{type(error).__name__}: {error}", 160)
    warnings.warn(
        f"the commit kernel does not work on {device} ({reason}); rows are moved by PyTorch, which is slower",
        stacklevel=2,
    )
    return False
