"""Pack documents into rows of one length, which avoids padding and makes all steps equally large.

Documents of a shuffled window are assigned to rows by best fit, longest first. The plan of an epoch depends on seed and epoch
alone, so row i is a function of (seed, i) and training resumes exactly.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medhead.errors import MedheadError
from medhead_training.data.feature_store import FeatureStore
from medhead_training.data.token_store import TokenStore

WINDOW = 4096  # pieces that are packed together


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of indices of `sizes` (1 to `capacity`): largest first, each in the fullest bin with room for it."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # free room of the open bins, ascending; `owners` says which bins these are
    owners: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[index]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            bins.append([])
            room, owner = capacity, len(bins) - 1
        else:
            room, owner = rooms.pop(at), owners.pop(at)
        bins[owner].append(index)
        if room > size:
            at = bisect_left(rooms, room - size)
            rooms.insert(at, room - size)
            owners.insert(at, owner)
    return bins


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Rows of exactly `length` tokens, all epochs one after the other; each epoch is packed and ordered differently.

    A row is a dictionary of `input_ids` (int64), `mask` (bool, tokens to learn to predict: those of the assistant, or all with
    `learn_from_all`), `document` (int64, index of the document within the row, -1 for padding) and `position_ids` (int64, from
    0 in each document), each `[length]`. Documents longer than `length` are cut into pieces, which count as documents of their
    own. With `kept`, the store of what the target says about all pieces, a row also has its arrays, `[length, size]`, zero for
    padding.
    """

    kept: FeatureStore | None = None

    def __init__(
        self, store: TokenStore, documents: Sequence[int] | np.ndarray, length: int,
        seed: int = 0, epochs: int = 1, pad_token: int = 0, learn_from_all: bool = False,
    ) -> None:  # fmt: skip
        chosen = np.asarray(documents, dtype=np.int64)
        if not len(chosen):
            raise MedheadError("there is no document to pack")
        if length < 1 or epochs < 1 or seed < 0:
            raise MedheadError(f"length and epochs must be at least 1, seed at least 0; got {length}, {epochs}, {seed}")
        self.store, self.length, self.seed, self.epochs, self.pad_token = store, length, seed, epochs, pad_token
        self.learn_from_all = learn_from_all
        sizes = store.lengths[chosen]
        starts = np.asarray(store.ends)[chosen] - sizes
        pieces = -(-sizes // length)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
        self._starts = np.repeat(starts, pieces) + number * length
        self._sizes = np.minimum(length, np.repeat(sizes, pieces) - number * length)
        self._offsets = np.cumsum(self._sizes) - self._sizes  # tokens of the pieces before each
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        rows = [len(self._plan(epoch)[1]) - 1 for epoch in range(epochs)]
        self._first = np.concatenate([[0], np.cumsum(rows)])  # row at which each epoch begins

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self._sizes.sum())

    @property
    def efficiency(self) -> float:
        """Fraction of all row positions that hold tokens."""
        return self.tokens * self.epochs / (len(self) * self.length)

    def epochs_in(self, rows: int) -> float:
        """Return how many epochs the first `rows` rows are."""
        return float(np.interp(rows, self._first, np.arange(self.epochs + 1)))

    def rows_of_epoch(self, epoch: int) -> range:
        """Return the indices of the rows of one epoch."""
        return range(int(self._first[epoch]), int(self._first[epoch + 1]))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return row `index`, a function of the seed and the index alone."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        epoch = int(np.searchsorted(self._first, index, side="right")) - 1
        order, bounds = self._plan(epoch)
        row = index - int(self._first[epoch])
        input_ids, document = np.full(self.length, self.pad_token, np.int64), np.full(self.length, -1, np.int64)
        mask, position_ids = np.zeros(self.length, np.bool_), np.zeros(self.length, np.int64)
        kept, at = self._empty_arrays(), 0
        for number, piece in enumerate(order[bounds[row] : bounds[row + 1]]):
            start, size = int(self._starts[piece]), int(self._sizes[piece])
            here = slice(at, at + size)
            input_ids[here], mask[here] = self._read(start, start + size)
            document[here], position_ids[here] = number, np.arange(size)
            offset = int(self._offsets[piece])
            for name, values in kept.items():
                assert self.kept is not None
                values[here] = self.kept.read(name, offset, offset + size)
            at += size
        arrays = {"input_ids": input_ids, "mask": mask, "document": document, "position_ids": position_ids}
        return {name: torch.from_numpy(values) for name, values in arrays.items()} | kept

    def fingerprint(self) -> str:
        """Return a hash of the store's name and of the pieces."""
        return hashlib.sha256(
            self.store.folder.name.encode() + self._starts.tobytes() + self._sizes.tobytes()
        ).hexdigest()

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield token ids and mask of every piece, in the order of the documents."""
        for start, size in zip(self._starts.tolist(), self._sizes.tolist(), strict=True):
            yield self._read(start, start + size)

    def _read(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = self.store.read(start, end)
        return ids, np.ones_like(mask) if self.learn_from_all else mask

    def _empty_arrays(self) -> dict[str, Tensor]:
        parts = None if self.kept is None else self.kept.parts
        return (
            {} if parts is None else {n: torch.zeros(self.length, s, dtype=parts.dtype) for n, s in parts.sizes.items()}
        )

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._plans:  # the pieces in row order, and the bounds of every row among them
            generator = np.random.default_rng([self.seed, epoch])
            shuffled = generator.permutation(len(self._sizes))
            rows: list[np.ndarray] = []
            for start in range(0, len(shuffled), WINDOW):
                window = shuffled[start : start + WINDOW]
                rows += [window[row] for row in best_fit(self._sizes[window].tolist(), self.length)]
            rows = [rows[row] for row in generator.permutation(len(rows))]
            while len(self._plans) > 1:  # a loader at the boundary of two epochs needs both
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = np.concatenate(rows), np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        return self._plans[epoch]
