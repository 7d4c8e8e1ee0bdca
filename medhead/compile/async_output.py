"""How the host gets what steps emitted: copied behind the step, read when it is needed."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor


class Outbox(Protocol):
    """What several steps emitted, in order."""

    def post(self) -> None:
        """Put the newest step's numbers behind the others."""

    def take(self) -> list[list[int]]:
        """The oldest ones, waiting for them if need be."""


def outbox(out: Tensor, most: int) -> Outbox:
    """For `[batch, numbers]` that every step overwrites, where up to `most` steps wait to be read."""
    return PinnedOutbox(out, most) if out.device.type == "cuda" else PlainOutbox(out)


class PlainOutbox:
    """Copies; for devices that compute when they are told to."""

    def __init__(self, out: Tensor) -> None:
        self._out, self._waiting = out, deque[Tensor]()

    def post(self) -> None:
        """See `Outbox`."""
        self._waiting.append(self._out.clone())

    def take(self) -> list[list[int]]:
        """See `Outbox`."""
        return self._waiting.popleft().tolist()


class PinnedOutbox:
    """Copies into pinned memory behind the step, without waiting; an event tells when one has arrived."""

    def __init__(self, out: Tensor, most: int) -> None:
        self._out = out
        self._free: deque[tuple[Tensor, Any]] = deque(
            (torch.empty(out.shape, dtype=out.dtype, pin_memory=True), torch.cuda.Event()) for _ in range(most + 1)
        )
        self._waiting = deque[tuple[Tensor, Any]]()

    def post(self) -> None:
        """See `Outbox`."""
        place, arrived = self._free.popleft()
        place.copy_(self._out, non_blocking=True)
        arrived.record()
        self._waiting.append((place, arrived))

    def take(self) -> list[list[int]]:
        """See `Outbox`."""
        place, arrived = self._waiting.popleft()
        arrived.synchronize()
        self._free.append((place, arrived))
        return place.tolist()
