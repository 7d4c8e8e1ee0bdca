"""What heads keep of the text: one entry for every committed token, beside the target's key/value cache.

Attention and block heads look back at the text. `DraftCacheView` is what one proposal or training step reads;
`TensorDraftCache` is the storage that decoding appends to after every pass. Its lengths are those of the target's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from medhead.core.lengths import Lengths

EncodeCacheEntry = Callable[[Tensor, Tensor, Tensor, int], Tensor]
PAGE = 64  # entries are allocated in multiples of this


@dataclass
class DraftCacheView:
    """Entries of a text that queries may look at."""

    rows: Tensor  # `[batch, length, size]`, what `Heads.encode_cache_entry` made of every token
    # `[batch, queries or 1]` int64: a query sees the entries before `end`, which is also the root's position
    end: Tensor
    # `[batch, queries or 1]` int64, first entry that is seen (texts packed one after the other), or None for 0
    begin: Tensor | None = None
    full: bool = False  # every query sees every entry

    def visible(self) -> Tensor | None:
        """Return `[batch, queries or 1, length]` bool, or None when every entry is seen."""
        if self.full:
            return None
        length = self.rows.shape[1]
        index = torch.arange(length, device=self.rows.device)
        seen = index < self.end[..., None]
        return seen if self.begin is None else seen & (index >= self.begin[..., None])


class DraftCache(Protocol):
    """What decoding asks of the storage; its lengths are advanced by the target's cache."""

    lengths: Lengths  # committed tokens of every row, shared with the target's cache

    def write(self, encode: EncodeCacheEntry, features: Tensor, token: Tensor, counts: Tensor) -> None:
        """Write entries, made by `encode` (`Heads.encode_cache_entry`), after the committed ones.

        `features` `[batch, n, size]` are the target's, `token` `[batch, n, ...]` the embeddings of the tokens after them, and
        `counts` `[batch]` int64 says how many of the n are part of each text.
        """

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these."""

    def join(self, other: Any) -> None:
        """Append the rows of another cache of these heads."""

    def view(self) -> Any:
        """Return what `Heads.init_state` reads."""

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """Return copies of what is kept of these tokens of a row, as tensors `[..., tokens, size]`."""

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """Take what `copy_tokens` returned, and no more, as the first tokens of a row; there is room for them."""


class TensorDraftCache:
    """Preallocated, ragged storage of entries of `size` numbers in one tensor; it doubles when `capacity` was too small."""

    def __init__(self, size: int, dtype: torch.dtype, lengths: Lengths, capacity: int = 4 * PAGE) -> None:
        batch, device = len(lengths.device), lengths.device.device
        self.lengths = lengths
        self.rows = torch.zeros(batch, -(-capacity // PAGE) * PAGE, size, dtype=dtype, device=device)

    @classmethod
    def from_buffer(cls, rows: Tensor, lengths: Lengths) -> TensorDraftCache:
        """Return a cache over existing storage `[batch, capacity, size]`."""
        cache = cls.__new__(cls)
        cache.rows, cache.lengths = rows, lengths
        return cache

    def write(self, encode: EncodeCacheEntry, features: Tensor, token: Tensor, counts: Tensor) -> None:
        """See `DraftCache.write`; where the host does not know the lengths there must be room."""
        n, lengths = features.shape[1], self.lengths
        offsets = torch.arange(n, device=self.rows.device)
        if lengths.host is not None:
            end = lengths.longest + n
            if end > self.rows.shape[1]:
                grown = max(2 * self.rows.shape[1], -(-end // PAGE) * PAGE)
                self.rows = F.pad(self.rows, (0, 0, 0, grown - self.rows.shape[1]))
            if lengths.uniform:
                self.rows[:, lengths.longest : end] = encode(features, token, offsets[None] + lengths.longest, end)
                return
        positions = lengths.device[:, None] + offsets
        made = encode(features, token, positions, self.rows.shape[1])
        self.rows.scatter_(1, positions[..., None].expand_as(made), made.to(self.rows.dtype))

    def keep_rows(self, rows: list[int]) -> None:
        """See `DraftCache.keep_rows`."""
        self.rows = self.rows[torch.tensor(rows, device=self.rows.device)]

    def join(self, other: TensorDraftCache) -> None:
        """See `DraftCache.join`."""
        length = max(self.rows.shape[1], other.rows.shape[1])
        self.rows = torch.cat([F.pad(rows, (0, 0, 0, length - rows.shape[1])) for rows in (self.rows, other.rows)])

    def view(self) -> DraftCacheView:
        """Return everything that is part of the texts."""
        lengths = self.lengths
        if lengths.host is None:
            return DraftCacheView(self.rows, lengths.device[:, None])
        return DraftCacheView(self.rows[:, : lengths.longest], lengths.device[:, None], full=lengths.uniform)

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `DraftCache.copy_tokens`."""
        return [self.rows[row, begin:end].clone()]

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """See `DraftCache.load_tokens`."""
        part = next(parts)
        self.rows[row, : len(part)] = part

    def nbytes(self) -> int:
        """Return the memory of the storage."""
        return self.rows.nbytes


class LazyDraftCache:
    """A draft cache whose entries of plain decoding wait until they are read, so that many are written at once.

    `encode` is `Heads.encode_cache_entry`, and `embed` maps token ids to the embeddings that `DraftCache.write` takes.
    """

    def __init__(self, cache: DraftCache, encode: EncodeCacheEntry, embed: Callable[[Tensor], Tensor]) -> None:
        self.cache, self._encode, self._embed = cache, encode, embed
        self._pending: list[tuple[Tensor, Tensor]] = []

    def write(self, features: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Write entries of the tokens `[batch, n]` that follow those of the features `[batch, n, size]`."""
        self.flush()
        self.cache.write(self._encode, features, self._embed(tokens), counts)

    def over(self, cache: DraftCache) -> LazyDraftCache:
        """Return the same over another storage."""
        return LazyDraftCache(cache, self._encode, self._embed)

    def write_later(self, features: Tensor, tokens: Tensor) -> None:
        """Take the entry of one token of every row, `[batch, 1]`; it is written before the cache is read."""
        self._pending.append((features, tokens))

    def keep_rows(self, rows: list[int]) -> None:
        """See `DraftCache.keep_rows`."""
        self.flush()
        self.cache.keep_rows(rows)

    def join(self, other: LazyDraftCache) -> None:
        """See `DraftCache.join`."""
        self.flush()
        other.flush()
        self.cache.join(other.cache)

    def view(self) -> Any:
        """See `DraftCache.view`."""
        self.flush()
        return self.cache.view()

    def copy_tokens(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `DraftCache.copy_tokens`."""
        self.flush()
        return self.cache.copy_tokens(row, begin, end)

    def load_tokens(self, row: int, parts: Iterator[Tensor]) -> None:
        """See `DraftCache.load_tokens`."""
        self.cache.load_tokens(row, parts)

    def flush(self) -> None:
        """Write the entries that wait; they belong to the last tokens of every row."""
        if not self._pending:
            return
        features, tokens = (torch.cat(parts, 1) for parts in zip(*self._pending, strict=True))
        count, self._pending = len(self._pending), []
        lengths = self.cache.lengths
        self.cache.lengths = lengths.back(count)
        try:
            self.cache.write(self._encode, features, self._embed(tokens), torch.full_like(lengths.device, count))
        finally:
            self.cache.lengths = lengths
