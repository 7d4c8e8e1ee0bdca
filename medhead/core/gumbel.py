"""Sampling noise as a function of (seed, row, position) alone.

A draw is `argmax(logits + gumbel)` (the Gumbel-max trick), and the Gumbel noise of a position comes from a
counter-based generator: hash the counter, do not advance a state. So every node that stands for one position shares
its noise, the text with a given seed does not depend on how it was guessed, and a proposer may look at the noise of
the positions it proposes for (coupling without communication, Daliri et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medhead_kernels.availability import has_numba, loops

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_CHEAP = 2**14  # numbers that are made in about the time that it takes to begin


def _mix_(x: Any) -> Any:
    """Scramble 32-bit values in place: multiply and xor-shift with full avalanche ("lowbias32").

    Args:
        x: a tensor that holds them in int64, because PyTorch has no arithmetic for uint32; or a uint32 array of numpy.
    """
    wide = isinstance(x, Tensor)  # products of uint32 need no mask
    x ^= x >> 16
    x *= 0x7FEB352D
    if wide:
        x &= _MASK
    x ^= x >> 15
    x *= 0x846CA68B
    if wide:
        x &= _MASK
    x ^= x >> 16
    return x


def _bits(low: Any, high: Any, rows: Any, positions: Any, lanes: Any) -> Any:
    """32 random bits for every row, position and lane, `[*positions.shape, V]`; see `_mix_` for what these may be."""
    key = _mix_((rows * _GOLDEN + low) & _MASK)
    key = _mix_((key ^ positions) + high & _MASK)
    second = _mix_((key + _GOLDEN) & _MASK)
    bits = _mix_(lanes ^ key[..., None])
    return _mix_(bits ^ second[..., None])


def halves(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a seed."""
    return seed & _MASK, (seed >> 32) & _MASK


class GumbelNoise:
    """Gumbel noise for the rows of one generation.

    Args:
        seed: any integer; 64 bits of it are used.
        vocab_size: number of tokens, V.
        device: where the noise is made. The same numbers come out on every device up to the last bit of `log`.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self._low: int | Tensor
        self._high: int | Tensor
        self._low, self._high = halves(seed)
        index = torch.arange(vocab_size, dtype=torch.int64, device=device)
        self._lanes = _mix_(index * _GOLDEN & _MASK)
        self._here = _uint32(self._lanes) if self._lanes.device.type == "cpu" else None

    def seeded_by(self, seed: Tensor) -> GumbelNoise:
        """The same generator with a seed that only the device knows: what `halves` makes of it, `[2]` int64."""
        other = copy(self)
        other._low, other._high = seed.unbind()
        return other

    def uniform(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Uniform numbers strictly between 0 and 1, `[*positions.shape, V]` float32.

        Args:
            rows: integer tensor that broadcasts with `positions`: which row of the batch, as the user numbered them.
            positions: absolute position of the token to draw.
        """
        low, high = self._low, self._high
        if self._here is not None and isinstance(low, int) and isinstance(high, int) and type(positions) is Tensor:
            return self._uniform_here(low, high, *torch.broadcast_tensors(rows, positions))
        bits = _bits(low, high, rows, positions, self._lanes) >> 9
        return bits.to(torch.float32).add_(0.5).mul_(2.0**-23)

    def _uniform_here(self, low: int, high: int, rows: Tensor, positions: Tensor) -> Tensor:
        """The same on a CPU, by a compiled loop if there is one, else by numpy, which has uint32."""
        assert self._here is not None
        halves, places = (np.uint32(low), np.uint32(high)), (_uint32(rows), _uint32(positions))
        if has_numba():
            out = np.empty((positions.numel(), len(self._here)), np.float32)
            loops().uniform(*halves, *(place.ravel() for place in places), self._here, out)
            return torch.from_numpy(out).view(*positions.shape, len(self._here))
        with np.errstate(over="ignore"):
            found = _bits(*halves, *places, self._here)
        return torch.from_numpy((found >> np.uint32(9)).view(np.int32)).to(torch.float32).add_(0.5).mul_(2.0**-23)

    def gumbel(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Standard Gumbel noise, `[*positions.shape, V]` float32."""
        return self.uniform(rows, positions).log_().neg_().log_().neg_()


def _uint32(values: Tensor) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """A tensor of numbers below 2**32 for numpy."""
    return values.numpy().astype(np.uint32)


class LazyGumbel:
    """Gumbel noise of the coming positions of every row, made as far as somebody looks, some depths at a time.

    Args:
        make: noise `[batch, end - begin, vocab]` of the depths from `begin` to `end` (0: the token below the root).
        most: how many depths may be asked for.
        piece: how many are made at a time, see `chunk_size`.
    """

    def __init__(self, make: Callable[[int, int], Tensor], most: int, piece: int) -> None:
        self._make, self._most, self._piece = make, most, min(piece, most)
        self._made: list[Tensor] = []  # `[batch, piece, vocab]`, the last one may be shorter

    @classmethod
    def of(cls, noise: Tensor) -> LazyGumbel:
        """That which is there: `[batch, depths, vocab]`."""
        return cls(lambda begin, end: noise[:, begin:end], noise.shape[1], noise.shape[1])

    def prefix(self, depths: int) -> Tensor:
        """`[batch, depths, vocab]`."""
        self._look(depths)
        pieces = self._made[: -(-depths // self._piece)]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))[:, :depths]

    def at(self, depth: int) -> Tensor:
        """`[batch, vocab]` of the tokens below nodes of this depth."""
        self._look(depth + 1)
        return self._made[depth // self._piece][:, depth % self._piece]

    def _look(self, depths: int) -> None:
        while len(self._made) * self._piece < depths:
            begin = len(self._made) * self._piece
            self._made.append(self._make(begin, min(begin + self._piece, self._most)))


def chunk_size(rows: int, vocab_size: int, device: torch.device) -> int:
    """Into what pieces to cut noise: on a CPU, where trees often end early, so much that starting the work does not count;
    elsewhere all of it, because a launch costs more than the numbers."""
    return max(1, _CHEAP // (rows * vocab_size)) if device.type == "cpu" else 2**31
