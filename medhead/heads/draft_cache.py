"""What heads keep of the text: one row for every committed token, as the target's cache keeps keys and values.

Attention heads need to look back. `DraftCacheView` is the view of it that one proposal (or one training step) reads;
`TensorDraftCache` is the storage beside the target's cache that decoding appends to after every pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EncodeCacheEntry = Callable[[Tensor, Tensor, Tensor, int], Tensor]
PAGE = 64  # rows are allocated in multiples of this


@dataclass
class DraftCacheView:
    """Rows of a text that queries may look at.

    Attributes:
        rows: `[batch, length, size]`, what `Heads.encode_cache_entry` made of every token.
        end: `[batch, queries or 1]` int64: a query sees the rows before `end`. It is also the root's position.
        begin: `[batch, queries or 1]` int64, first row that is seen (texts packed behind each other), or None for 0.
        full: every query sees every row.
    """

    rows: Tensor
    end: Tensor
    begin: Tensor | None = None
    full: bool = False

    def visible(self) -> Tensor | None:
        """`[batch, queries or 1, length]` bool, or None when every row is seen."""
        if self.full:
            return None
        length = self.rows.shape[1]
        index = torch.arange(length, device=self.rows.device)
        seen = index < self.end[..., None]
        return seen if self.begin is None else seen & (index >= self.begin[..., None])


class DraftCache(Protocol):
    """What decoding asks of the storage beside the target's cache; `TensorDraftCache` says what each method does."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text that are kept."""

    def write(self, encode_cache_entry: EncodeCacheEntry, features: Tensor, token: Tensor) -> None:
        """Put new tokens behind every text."""

    def advance(self, counts: list[int]) -> None:
        """This many of them are part of each text."""

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all texts but these."""

    def join(self, other: Any) -> None:
        """Put the texts of another storage of these heads behind these."""

    def view(self) -> Any:
        """What `Heads.start` is given."""


class TensorDraftCache:
    """Preallocated, ragged storage of `DraftCacheView` rows for a batch that is being decoded.

    Args:
        batch: number of texts.
        size: numbers in a row.
        dtype: their type.
        device: where they live.
        capacity: rows expected; the storage doubles when that was too few.
    """

    def __init__(
        self, batch: int, size: int, dtype: torch.dtype, device: torch.device, capacity: int = 4 * PAGE
    ) -> None:
        self.lengths = [0] * batch  # on the host, like the target's cache
        self._rows = torch.zeros(batch, -(-capacity // PAGE) * PAGE, size, dtype=dtype, device=device)

    @classmethod
    def of(cls, rows: Tensor, lengths: list[int]) -> TensorDraftCache:
        """Storage that is there already, `[batch, capacity, size]`, with so many rows of every text in it."""
        store = cls(0, rows.shape[2], rows.dtype, rows.device, 0)
        store._rows, store.lengths = rows, list(lengths)
        return store

    def write(self, encode_cache_entry: EncodeCacheEntry, features: Tensor, token: Tensor) -> None:
        """Put new rows behind every text; they are part of it once `advance` says so.

        Args:
            encode_cache_entry: `Heads.encode_cache_entry`, which makes the rows.
            features: `[batch, count, size]`.
            token: `[batch, count, ...]`.
        """
        count, longest = features.shape[1], max(self.lengths)
        if longest + count > self._rows.shape[1]:
            grown = max(2 * self._rows.shape[1], -(-(longest + count) // PAGE) * PAGE)
            bigger = self._rows.new_zeros(len(self.lengths), grown, self._rows.shape[2])
            bigger[:, : self._rows.shape[1]] = self._rows
            self._rows = bigger
        if min(self.lengths) == longest:
            offsets = torch.arange(count, device=self._rows.device)
            rows = encode_cache_entry(features, token, offsets[None] + longest, longest + count)
            self._rows[:, longest : longest + count] = rows
            return
        append_entries(self._rows, self._end(), encode_cache_entry, features, token)

    def advance(self, counts: list[int]) -> None:
        """This many of the rows written last are part of each text now."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all texts but these."""
        self._rows = self._rows[torch.tensor(rows, device=self._rows.device)]
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: TensorDraftCache) -> None:
        """Put the texts of another storage behind these."""
        length = max(self._rows.shape[1], other._rows.shape[1])
        parts = [F.pad(rows, (0, 0, 0, length - rows.shape[1])) for rows in (self._rows, other._rows)]
        self._rows, self.lengths = torch.cat(parts), self.lengths + other.lengths

    def view(self) -> DraftCacheView:
        """Everything that is part of the texts."""
        longest = max(self.lengths)
        return DraftCacheView(self._rows[:, :longest], self._end()[:, None], full=min(self.lengths) == longest)

    @property
    def rows(self) -> Tensor:
        """`[batch, capacity, size]`, the storage itself."""
        return self._rows

    def nbytes(self) -> int:
        """DraftCacheView of the storage."""
        return self._rows.numel() * self._rows.element_size()

    def _end(self) -> Tensor:
        return torch.tensor(self.lengths, device=self._rows.device)


def append_entries(
    rows: Tensor, lengths: Tensor, encode_cache_entry: EncodeCacheEntry, features: Tensor, token: Tensor
) -> None:
    """Put new rows into `rows` `[batch, capacity, size]` behind texts whose lengths `[batch]` the device knows.

    There must be room: nobody looks.
    """
    where = lengths[:, None] + torch.arange(features.shape[1], device=rows.device)
    made = encode_cache_entry(features, token, where, rows.shape[1])
    rows.scatter_(1, where[..., None].expand_as(made), made.to(rows.dtype))
