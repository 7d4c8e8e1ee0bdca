"""How the host gets what captured steps emitted: copied after the step, read when it is needed."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


def async_output(output: Tensor, max_queued: int) -> CopiedOutput | PinnedOutput:
    """Return a queue for `[batch, numbers]`, which every step overwrites, of up to `max_queued` steps."""
    return PinnedOutput(output, max_queued) if output.device.type == "cuda" else CopiedOutput(output)


class CopiedOutput:
    """What several steps emitted, in order; for devices that compute synchronously."""

    def __init__(self, output: Tensor) -> None:
        self._output, self._queued = output, deque[Tensor]()

    def __len__(self) -> int:
        return len(self._queued)

    def post(self) -> None:
        """Queue the newest step's numbers."""
        self._queued.append(self._output.clone())

    def take(self) -> list[list[int]]:
        """Return the oldest queued numbers; wait for them if need be."""
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
        """Queue the newest step's numbers."""
        copy, arrived = self._free.popleft()
        copy.copy_(self._output, non_blocking=True)
        arrived.record()
        self._queued.append((copy, arrived))

    def take(self) -> list[list[int]]:
        """Return the oldest queued numbers; wait for them if need be."""
        copy, arrived = self._queued.popleft()
        arrived.synchronize()
        self._free.append((copy, arrived))
        return copy.tolist()
