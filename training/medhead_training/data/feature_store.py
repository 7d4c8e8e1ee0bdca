"""What a frozen target says about its training text, computed once and read through memory maps in every epoch.

A store is a folder of the run: `features.bin` holds the heads' input of every token, `teacher.bin` what the loss needs of the
target there. Both are written in the order of the documents, one group of documents after the other; `progress` holds the
number of tokens that are on the disk. `key` is a hash of everything that the numbers depend on; a store with another key
is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from os import fsync
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

GROUP_TOKENS = 16384  # read, sorted by length and written together; a killed computation loses at most one group
PASS_TOKENS = 4096  # of one pass of the target, padding included
_VERSION = 1

Piece = tuple[np.ndarray, np.ndarray]  # token ids and mask
ComputeFn = Callable[[Tensor, Tensor], list[Tensor]]  # ids and mask [rows, length] -> parts [rows, length, size]


@dataclass(frozen=True)
class FeatureParts:
    """Names, widths and dtype of the arrays of a store."""

    sizes: dict[str, int]  # numbers per token, by name
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of all arrays per token."""
        return sum(self.sizes.values()) * self.dtype.itemsize


class FeatureStore:
    """A complete store; `read` returns the arrays of a range of its tokens."""

    def __init__(self, folder: Path, tokens: int, parts: FeatureParts) -> None:
        self.folder, self.tokens, self.parts = folder, tokens, parts
        self._arrays = {
            name: torch.from_file(str(_file(folder, name)), False, tokens * size, dtype=parts.dtype).view(tokens, size)
            for name, size in parts.sizes.items()
        }

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path, int, FeatureParts]]:
        return FeatureStore, (self.folder, self.tokens, self.parts)  # another process maps the files itself

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Return one array's rows of the tokens `start` to `end`, `[end - start, size]`."""
        return self._arrays[name][start:end]


def store_key(*facts: Any) -> str:
    """Return the hash of everything that a store's numbers depend on."""
    return hashlib.sha256(json.dumps([_VERSION, *facts], default=str).encode()).hexdigest()[:24]


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return a hash of names, shapes, dtypes and at most about 8,192 numbers of each tensor."""
    found: list[Any] = []
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 4096)].contiguous().view(torch.uint8).cpu().numpy()
        found.append([name, list(tensor.shape), str(tensor.dtype), hashlib.sha256(sample.tobytes()).hexdigest()[:16]])
    return store_key(found)


def started(folder: Path, key: str) -> bool:
    """Return whether this folder holds a store of this key, complete or not."""
    try:
        return (folder / "key").read_text(encoding="utf-8") == key
    except OSError:
        return False


def prepare_features(
    folder: Path, key: str, parts: FeatureParts, pieces: Iterable[Piece], total: int, compute: ComputeFn,
    progress: bool = True,
) -> FeatureStore:  # fmt: skip
    """Return the store of these pieces of text with `total` tokens, computing what is not on the disk yet.

    `compute` reads rows of one piece each, padded with zeros at the end, and returns the arrays in the order of `parts`.
    """
    if not started(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "key").write_text(key, encoding="utf-8")
    done = _progress(folder, parts)
    bar = tqdm(
        total=total, initial=done, unit="token", unit_scale=True, desc="features", disable=not progress or done >= total
    )
    with ExitStack() as stack:
        stack.enter_context(bar)
        files = [
            stack.enter_context(_open(_file(folder, n), done * s * parts.dtype.itemsize))
            for n, s in parts.sizes.items()
        ]
        for start, group in _groups(pieces):
            if start < done:
                continue
            for file, values in zip(files, _read_group(group, compute, parts), strict=True):
                file.write(values.contiguous().view(torch.uint8).numpy().tobytes())
                file.flush()
                fsync(file.fileno())
            done = start + sum(len(ids) for ids, _ in group)
            temporary = folder / ".progress"
            temporary.write_text(str(done), encoding="utf-8")
            temporary.replace(folder / "progress")
            bar.update(done - bar.n)
    return FeatureStore(folder, total, parts)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _progress(folder: Path, parts: FeatureParts) -> int:
    """Return how many tokens are on the disk, 0 if a file is shorter than that."""
    try:
        done = int((folder / "progress").read_text(encoding="utf-8"))
        sizes = [
            (_file(folder, name).stat().st_size, size * parts.dtype.itemsize) for name, size in parts.sizes.items()
        ]
    except (OSError, ValueError):
        return 0
    return done if all(found >= done * per_token for found, per_token in sizes) else 0


def _open(path: Path, size: int) -> Any:
    """Open a file for writing after its first `size` bytes; what a kill left after them is cut off."""
    file = path.open("ab")
    file.truncate(size)
    return file


def _groups(pieces: Iterable[Piece]) -> Iterator[tuple[int, list[Piece]]]:
    """Yield groups of consecutive pieces with the number of tokens before each."""
    start, size = 0, 0
    group: list[Piece] = []
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= GROUP_TOKENS:
            yield start, group
            start, size, group = start + size, 0, []
    if group:
        yield start, group


def _read_group(group: list[Piece], compute: ComputeFn, parts: FeatureParts) -> list[Tensor]:
    """Return the arrays of a group `[tokens, size]`; pieces of similar length share a pass."""
    lengths = np.array([len(ids) for ids, _ in group])
    starts = np.cumsum(lengths) - lengths
    result = [torch.empty(int(lengths.sum()), size, dtype=parts.dtype) for size in parts.sizes.values()]
    order = np.argsort(-lengths, kind="stable").tolist()
    while order:
        count = max(1, PASS_TOKENS // int(lengths[order[0]]))
        rows, order = order[:count], order[count:]
        ids = torch.zeros(len(rows), int(lengths[rows[0]]), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, number in enumerate(rows):
            size = lengths[number]
            ids[row, :size], mask[row, :size] = (torch.from_numpy(np.array(part)) for part in group[number])
        for whole, found in zip(result, compute(ids, mask), strict=True):
            for row, number in enumerate(rows):
                whole[starts[number] : starts[number] + lengths[number]] = found[row, : lengths[number]].to(whole)
    return result
