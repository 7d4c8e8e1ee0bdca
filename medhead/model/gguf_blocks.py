"""The integers of a GGUF file as blocks of the CPU kernel, for the linear layers of the model that was loaded from it.

transformers dequantises the file, renames its tensors and, for some architectures, permutes their rows. A layer's tensor is
found by its numbers: it is the one whose dequantised rows are the rows of the layer's weight, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medhead_kernels import block_linear
from medhead_kernels.block_linear import GROUP, Blocks
from medhead_kernels.packed_linear import row_checksums


class Levels(NamedTuple):
    """A tensor of a file: `weight = levels * scales + minimums`, with a scale for every 32 inputs, or 16 (`int8 by 16`)."""

    levels: Tensor  # [out, size] integers
    scales: Tensor  # [out, groups] float32
    minimums: Tensor  # the same, or empty
    kind: str

    def weight(self) -> Tensor:
        """Return `[out, size]` float32, by the arithmetic of the package gguf."""
        grouped = self.levels.float().unflatten(1, (self.scales.shape[1], -1)) * self.scales[..., None]
        return (grouped + self.minimums[..., None] if self.minimums.numel() else grouped).flatten(1)

    def rows(self, order: Tensor) -> Levels:
        """Return these rows."""
        minimums = self.minimums[order] if self.minimums.numel() else self.minimums
        return Levels(self.levels[order], self.scales[order], minimums, self.kind)


def find_blocks(path: Path, layers: Sequence[nn.Linear]) -> dict[nn.Module, Blocks]:
    """Return the blocks of the layers whose weights the file holds in 4 to 8 bits (`_PARSERS`); others are left out."""
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
    parser = _PARSERS[kind]
    return parser(raw.unflatten(1, (size // (_SUPERBLOCK if kind.endswith("_K") else GROUP), -1)))


def _half(blocks: Tensor, place: int) -> Tensor:
    """Return the float16 numbers at a byte of every block, as float32."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16)[..., 0].float()


def _nibbles(stored: Tensor) -> Tensor:
    """Return the lower 4 bits of all bytes of the last dimension, then the upper ones."""
    return torch.cat([stored & 15, stored >> 4], -1)


def _bits(stored: Tensor) -> Tensor:
    """Return the 8 bits of every byte, the lowest first, in a new last dimension."""
    return stored[..., None] >> torch.arange(8, dtype=torch.uint8) & 1


def _five(blocks: Tensor, place: int) -> Tensor:
    """Return the 32 5-bit integers of every block: the upper bits are in 4 bytes, the others in the 16 bytes after them."""
    upper = _bits(blocks[..., place : place + 4]).flatten(-2)
    return (_nibbles(blocks[..., place + 4 :]) | upper << 4).flatten(1)


def _q8_0(blocks: Tensor) -> Levels:
    return Levels(blocks[..., 2:].flatten(1).view(torch.int8), _half(blocks, 0), torch.empty(0), "int8")


def _q4_0(blocks: Tensor) -> Levels:
    scales = _half(blocks, 0)
    return Levels(_nibbles(blocks[..., 2:]).flatten(1), scales, -8 * scales, "int4")


def _q4_1(blocks: Tensor) -> Levels:
    return Levels(_nibbles(blocks[..., 4:]).flatten(1), _half(blocks, 0), _half(blocks, 2), "int4")


def _q5_0(blocks: Tensor) -> Levels:
    return Levels(_five(blocks, 2).to(torch.int8) - 16, _half(blocks, 0), torch.empty(0), "int8")


def _q5_1(blocks: Tensor) -> Levels:
    return Levels(_five(blocks, 4), _half(blocks, 0), _half(blocks, 2), "uint8")


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the 8 groups of every superblock: 6-bit integers in 12 bytes, times two float16 numbers."""
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    minimums = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)
    scales, minimums = _half(blocks, 0)[..., None] * scales, _half(blocks, 2)[..., None] * minimums
    return scales.flatten(1), -minimums.flatten(1)


def _q4_k(blocks: Tensor) -> Levels:
    levels = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Levels(levels.flatten(1), *_scales_and_minimums(blocks), "int4")


def _q5_k(blocks: Tensor) -> Levels:
    upper = _bits(blocks[..., 16:48]).transpose(-1, -2)  # a bit of every byte for each group
    levels = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2) | upper << 4
    return Levels(levels.flatten(1), *_scales_and_minimums(blocks), "uint8")


def _q6_k(blocks: Tensor) -> Levels:
    lower = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    pairs = blocks[..., 128:192].unflatten(-1, (2, 32))
    upper = torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    scales = _half(blocks, 208)[..., None] * blocks[..., 192:208].contiguous().view(torch.int8)
    return Levels((lower | upper << 4).to(torch.int8).flatten(1) - 32, scales.flatten(1), torch.empty(0), "int8 by 16")


_SUPERBLOCK = 256  # weights
_PARSERS: dict[str, Callable[[Tensor], Levels]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
