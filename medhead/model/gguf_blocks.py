"""The integers of a GGUF file as blocks of the CPU kernel, for the linear layers of the model that was loaded from it.

transformers dequantises the file, renames its tensors and, for some architectures, permutes their rows. A layer's tensor is
found by its numbers: it is the one whose dequantised rows are the rows of the layer's weight, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medhead_kernels import block_linear
from medhead_kernels.block_linear import GROUP, Blocks
from medhead_kernels.packed_linear import row_checksums


class Levels(NamedTuple):
    """A tensor of a file: `weight = levels * scales + minimums`, with a scale for every 32 inputs."""

    levels: Tensor  # [out, size] integers
    scales: Tensor  # [out, groups] float32
    minimums: Tensor  # the same, or empty
    kind: str

    def weight(self) -> Tensor:
        """Return `[out, size]` float32, by the arithmetic of the package gguf."""
        grouped = self.levels.float().unflatten(1, (-1, GROUP)) * self.scales[..., None]
        return (grouped + self.minimums[..., None] if self.minimums.numel() else grouped).flatten(1)

    def rows(self, order: Tensor) -> Levels:
        """Return these rows."""
        minimums = self.minimums[order] if self.minimums.numel() else self.minimums
        return Levels(self.levels[order], self.scales[order], minimums, self.kind)


def find_blocks(path: Path, layers: Sequence[nn.Linear]) -> dict[nn.Module, Blocks]:
    """Return the blocks of the layers whose weights the file holds in 8 or 4 bits (Q8_0, Q4_0, Q4_1); others are left out."""
    wanted: dict[tuple[int, ...], list[nn.Linear]] = {}
    for layer in layers:
        wanted.setdefault(tuple(layer.weight.shape), []).append(layer)
    found: dict[nn.Module, Blocks] = {}
    for stored in _tensors(path):
        candidates = wanted.get(tuple(stored.levels.shape), [])
        if not candidates:
            continue
        weight = stored.weight()
        places = {int(checksum): row for row, checksum in enumerate(row_checksums(weight).tolist())}
        for layer in candidates:
            ours = layer.weight.detach().float().contiguous()
            order = [places.get(checksum) for checksum in row_checksums(ours[:1]).tolist()]
            if None in order:
                continue
            order = [places.get(checksum, 0) for checksum in row_checksums(ours).tolist()]
            if torch.equal(weight[order], ours):
                found[layer] = block_linear.from_levels(*stored.rows(torch.tensor(order)))
                candidates.remove(layer)
                break
    return found


def _tensors(path: Path) -> Iterator[Levels]:
    """Yield the quantised matrices of a file."""
    from gguf import GGUFReader

    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type.name in _PARSERS and len(tensor.shape) == 2:
            yield parse(tensor.tensor_type.name, torch.from_numpy(tensor.data.copy()), int(tensor.shape[0]))


def parse(kind: str, raw: Tensor, size: int) -> Levels:
    """Return the integers of a tensor of `[out, bytes]` uint8 that stores `[out, size]` weights of a type of GGUF."""
    return _PARSERS[kind](raw.unflatten(1, (size // GROUP, -1)))


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the float16 numbers at a byte of every block, as float32."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(blocks: Tensor, place: int) -> Tensor:
    """Return the 32 4-bit integers of every block: the lower bits of 16 bytes, then the upper ones."""
    stored = blocks[..., place:]
    return torch.cat([stored & 15, stored >> 4], -1).flatten(1)


def _q8_0(blocks: Tensor) -> Levels:
    return Levels(blocks[..., 2:].flatten(1).view(torch.int8), _half(blocks, 0), torch.empty(0), "int8")


def _q4_0(blocks: Tensor) -> Levels:
    scales = _half(blocks, 0)
    return Levels(_nibbles(blocks, 2), scales, -8 * scales, "int4")


def _q4_1(blocks: Tensor) -> Levels:
    return Levels(_nibbles(blocks, 4), _half(blocks, 0), _half(blocks, 2), "int4")


_PARSERS: dict[str, Any] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
