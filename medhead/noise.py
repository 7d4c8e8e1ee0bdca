"""Sampling noise as a function of (seed, row, position) alone.

A draw is `argmax(logits + gumbel)` (the Gumbel-max trick), and the Gumbel noise of a position comes from a
counter-based generator: hash the counter, do not advance a state. So every node that stands for one position shares
its noise, the text with a given seed does not depend on how it was guessed, and a proposer may look at the noise of
the positions it proposes for (coupling without communication, Daliri et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix_(x: Tensor) -> Tensor:
    """Scramble 32-bit values held in int64, in place: multiply and xor-shift with full avalanche ("lowbias32")."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x &= _MASK
    x ^= x >> 15
    x *= 0x846CA68B
    x &= _MASK
    x ^= x >> 16
    return x


def halves(seed: int) -> tuple[int, int]:
    """The lower and the upper 32 bits of a seed."""
    return seed & _MASK, (seed >> 32) & _MASK


class Noise:
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

    def seeded_by(self, seed: Tensor) -> Noise:
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
        key = _mix_((rows * _GOLDEN + self._low) & _MASK)
        key = _mix_((key ^ positions) + self._high & _MASK)
        second = _mix_((key + _GOLDEN) & _MASK)
        bits = _mix_(self._lanes ^ key[..., None])
        bits = _mix_(bits ^ second[..., None])
        return (bits >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)

    def gumbel(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Standard Gumbel noise, `[*positions.shape, V]` float32."""
        return self.uniform(rows, positions).log_().neg_().log_().neg_()


class ComingNoise:
    """Gumbel noise of the coming positions of every row, made as far as somebody looks.

    On a CPU every depth is made when it is first asked for, because trees often end early; elsewhere all at once, because a
    launch costs more than the numbers.

    Args:
        make: noise `[batch, end - begin, vocab]` of the depths from `begin` to `end` (0: the token below the root).
        most: how many depths may be asked for.
        piecemeal: whether to make it depth by depth.
    """

    def __init__(self, make: Callable[[int, int], Tensor], most: int, piecemeal: bool) -> None:
        self._make, self._most, self._piecemeal = make, most, piecemeal
        self._made: list[Tensor] = []  # `[batch, vocab]` of every depth
        self._whole: Tensor | None = None

    @classmethod
    def of(cls, noise: Tensor) -> ComingNoise:
        """That which is there: `[batch, depths, vocab]`."""
        return cls(lambda begin, end: noise[:, begin:end], noise.shape[1], piecemeal=False)

    def upto(self, depths: int) -> Tensor:
        """`[batch, depths, vocab]`."""
        if not self._piecemeal:
            if self._whole is None:
                self._whole = self._make(0, self._most)
            return self._whole[:, :depths]
        self._look(depths)
        return self._made[0][:, None] if depths == 1 else torch.stack(self._made[:depths], 1)

    def at(self, depth: int) -> Tensor:
        """`[batch, vocab]` of the tokens below nodes of this depth."""
        if self._piecemeal:
            self._look(depth + 1)
            return self._made[depth]
        return self.upto(depth + 1)[:, depth]

    def _look(self, depths: int) -> None:
        if depths > len(self._made):
            self._made += self._make(len(self._made), depths).unbind(1)
