"""Sampling noise as a function of (seed, row, position) alone.

A draw is `argmax(logits + gumbel)` (the Gumbel-max trick). The Gumbel noise of a position comes from a counter-based
generator: it hashes the counter and keeps no state. So all nodes at one position share their noise, the text with a given
seed does not depend on the proposer, and a proposer may look at the noise of the positions it proposes for (coupling without
communication, Daliri et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

_Array = np.ndarray[Any, np.dtype[Any]]
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_CHUNK_NUMBERS = 2**14  # numbers per CPU call; with fewer, call overhead dominates


def _mix_(x: Any) -> Any:
    """Scramble 32-bit values in place: multiply and xor-shift with full avalanche ("lowbias32").

    Args:
        x: an int64 tensor of 32-bit values (PyTorch has no uint32 arithmetic), or a numpy array of uint32.
    """
    wide = isinstance(x, Tensor)  # numpy's uint32 products need no mask
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


def _mix_into(x: _Array, scratch: _Array) -> None:
    """`_mix_` of a numpy array, without allocating."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        np.right_shift(x, shift, out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        if factor is not None:
            np.multiply(x, np.uint32(factor), out=x)


def _keys(low: Any, high: Any, rows: Any, positions: Any) -> tuple[Any, Any]:
    """Return two 32-bit keys for every position, `[batch, n]`."""
    with np.errstate(over="ignore"):
        key = _mix_((rows * _GOLDEN + low) & _MASK)
        key = _mix_((key ^ positions) + high & _MASK)
        return key, _mix_((key + _GOLDEN) & _MASK)


def _bits(low: Tensor, high: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return 32 random bits for every position and token, `[batch, n, vocab]`."""
    first, second = _keys(low, high, rows, positions)
    bits: Tensor = _mix_(_mix_(tokens ^ first[..., None]) ^ second[..., None])
    return bits


def seed_halves(seed: int) -> tuple[int, int]:
    """Return the lower and the upper 32 bits of a seed."""
    return seed & _MASK, (seed >> 32) & _MASK


class GumbelNoise:
    """Counter-based Gumbel noise.

    Args:
        vocab_size: number of tokens.
        device: where the noise is made; every device makes the same numbers up to the last bit of `log`.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)

    @cached_property
    def _tokens(self) -> Tensor:
        """What the token contributes to the counter, `[vocab]`; made when noise is first asked for."""
        index = torch.arange(self.vocab_size, dtype=torch.int64, device=self.device)
        tokens: Tensor = _mix_(index * _GOLDEN & _MASK)
        return tokens

    @cached_property
    def _host_tokens(self) -> _Array:
        return _uint32(self._tokens)

    def uniform(self, seeds: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Return uniform numbers strictly between 0 and 1, `[batch, n, vocab]` float32.

        Args:
            seeds: `[batch, 2]` int64, the `seed_halves` of every sequence.
            rows: `[batch]` int64, row of the user's batch.
            positions: `[batch, n]` int64, absolute position of the token to draw.
        """
        low, high, rows = seeds[:, :1], seeds[:, 1:], rows[:, None]
        if self.device.type != "cpu" or type(positions) is not Tensor:
            bits = _bits(low, high, rows, positions, self._tokens) >> 9
            return bits.to(torch.float32).add_(0.5).mul_(2.0**-23)
        return torch.from_numpy(self._uniform_on_host(*map(_uint32, (low, high, rows, positions))))

    def _uniform_on_host(self, low: _Array, high: _Array, rows: _Array, positions: _Array) -> _Array:
        """Return the same numbers by numpy's uint32, a position at a time: its working memory stays in the processor's cache."""
        first, second = (np.broadcast_to(key, positions.shape) for key in _keys(low, high, rows, positions))
        uniform = np.empty((*positions.shape, len(self._host_tokens)), np.float32)
        bits, scratch = np.empty_like(self._host_tokens), np.empty_like(self._host_tokens)
        for place in np.ndindex(positions.shape):
            np.bitwise_xor(self._host_tokens, first[place], out=bits)
            _mix_into(bits, scratch)
            np.bitwise_xor(bits, second[place], out=bits)
            _mix_into(bits, scratch)
            np.right_shift(bits, 9, out=bits)
            row = uniform[place]
            row[...] = bits.view(np.int32)
            row += np.float32(0.5)
            row *= np.float32(2.0**-23)
        return uniform

    def gumbel(self, seeds: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Return standard Gumbel noise, `[batch, n, vocab]` float32; the arguments are those of `uniform`."""
        return self.uniform(seeds, rows, positions).log_().neg_().log_().neg_()


def _uint32(values: Tensor) -> _Array:
    return values.numpy().astype(np.uint32)


class LazyGumbel:
    """Gumbel noise of the coming positions of every sequence, made only as far as it is read.

    Args:
        make: return the noise `[batch, end - begin, vocab]` of the depths from `begin` to `end`; depth 0 is the token
            below the root.
        max_depths: how many depths may be read.
        chunk: how many depths are made at a time, see `chunk_size`.
    """

    def __init__(self, make: Callable[[int, int], Tensor], max_depths: int, chunk: int) -> None:
        self._make, self._max_depths, self._chunk = make, max_depths, min(chunk, max_depths)
        self._made: list[Tensor] = []  # `[batch, chunk, vocab]`; the last one may be shorter

    @classmethod
    def of(cls, noise: Tensor) -> LazyGumbel:
        """Wrap noise that exists, `[batch, depths, vocab]`."""
        return cls(lambda begin, end: noise[:, begin:end], noise.shape[1], noise.shape[1])

    def prefix(self, depths: int) -> Tensor:
        """Return the noise of the first depths, `[batch, depths, vocab]`."""
        self._extend(depths)
        chunks = self._made[: -(-depths // self._chunk)]
        return (chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1))[:, :depths]

    def at(self, depth: int) -> Tensor:
        """Return the noise `[batch, vocab]` of the tokens below nodes of this depth."""
        self._extend(depth + 1)
        return self._made[depth // self._chunk][:, depth % self._chunk]

    def _extend(self, depths: int) -> None:
        while len(self._made) * self._chunk < depths:
            begin = len(self._made) * self._chunk
            self._made.append(self._make(begin, min(begin + self._chunk, self._max_depths)))


def chunk_size(rows: int, vocab_size: int, device: torch.device) -> int:
    """Return how many depths of noise to make at a time: on a CPU few, because trees often end early; on a GPU all."""
    return max(1, _CHUNK_NUMBERS // (rows * vocab_size)) if device.type == "cpu" else 2**31
