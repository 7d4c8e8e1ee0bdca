"""The number of committed tokens of every sequence, on the device and, where the host may know it, on the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Lengths:
    """Committed tokens of every sequence of a batch.

    Attributes:
        device: `[batch]` int64, the numbers that passes read.
        host: the same numbers on the host; None in a captured step, whose host never reads a tensor.
    """

    def __init__(self, device: Tensor, host: list[int] | None) -> None:
        self.device, self.host = device, host

    @classmethod
    def of(cls, numbers: list[int], device: torch.device | str = "cpu") -> Lengths:
        """Return lengths that both sides know."""
        return cls(torch.tensor(numbers, device=device), list(numbers))

    @property
    def longest(self) -> int:
        """The largest length; only where the host knows the lengths."""
        assert self.host is not None, "the host does not know the lengths of a captured step"
        return max(self.host, default=0)

    @property
    def uniform(self) -> bool:
        """Whether the host knows that all lengths are equal."""
        return self.host is not None and min(self.host, default=0) == max(self.host, default=0)

    def set(self, numbers: list[int]) -> None:
        """Replace all numbers."""
        self.device, self.host = torch.tensor(numbers, device=self.device.device), list(numbers)

    def advance(self, counts: Tensor, host_counts: list[int] | None = None) -> None:
        """Add `counts` `[batch]`, which the host knows as `host_counts` where it knows the lengths."""
        self.device.add_(counts)
        if self.host is not None:
            host_counts = counts.tolist() if host_counts is None else host_counts
            self.host = [length + count for length, count in zip(self.host, host_counts, strict=True)]

    def keep_rows(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        assert self.host is not None
        self.set([self.host[row] for row in rows])

    def join(self, other: Lengths) -> None:
        """Append the rows of another batch."""
        assert self.host is not None
        assert other.host is not None
        self.set(self.host + other.host)

    def back(self, steps: int) -> Lengths:
        """Return the lengths of `steps` tokens ago."""
        assert self.host is not None
        return Lengths(self.device - steps, [length - steps for length in self.host])
