"""How the host gets what captured steps emitted: copied after the step, read when it is needed."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor


class AsyncOutput(Protocol):
    """What several steps emitted, in order."""

    def __len__(self) -> int:
        """Return how many steps are queued."""

    def post(self) -> None:
        """Queue the newest step's numbers."""

    def take(self) -> list[list[int]]:
        """Return the oldest queued ones; wait for them if need be."""


def async_output(output: Tensor, max_queued: int) -> AsyncOutput:
    """Return a queue for `[batch, numbers]`, which every step overwrites, of up to `max_queued` steps."""
    return PinnedOutput(output, max_queued) if output.device.type == "cuda" else CopiedOutput(output)


class CopiedOutput:
    """Copies, for devices that compute synchronously."""

    def __init__(self, output: Tensor) -> None:
        self._output, self._queued = output, deque[Tensor]()

    def __len__(self) -> int:
        return len(self._queued)

    def post(self) -> None:
        """See `AsyncOutput`."""
        self._queued.append(self._output.clone())

    def take(self) -> list[list[int]]:
        """See `AsyncOutput`."""
        return self._queued.popleft().tolist()


class PinnedOutput:
    """Copies into pinned memory on the step's stream; an event tells when a copy has arrived."""

    def __init__(self, output: Tensor, max_queued: int) -> None:
        self._output = output
        self._free: deque[tuple[Tensor, Any]] = deque(
            (torch.empty(output.shape, dtype=output.dtype, pin_memory=True), torch.cuda.Event())
            for _ in range(max_queued + 1)
        )
        self._queued = deque[tuple[Tensor, Any]]()

    def __len__(self) -> int:
        return len(self._queued)

    def post(self) -> None:
        """See `AsyncOutput`."""
        copy, arrived = self._free.popleft()
        copy.copy_(self._output, non_blocking=True)
        arrived.record()
        self._queued.append((copy, arrived))

    def take(self) -> list[list[int]]:
        """See `AsyncOutput`."""
        copy, arrived = self._queued.popleft()
        arrived.synchronize()
        self._free.append((copy, arrived))
        return copy.tolist()
