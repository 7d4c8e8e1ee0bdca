"""Where the time of steps goes, for profiles."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass
class StepTimes:
    """Seconds spent in each part of all steps, with the device synchronised around every part; for profiles."""

    propose: float = 0.0
    forward: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    other: float = 0.0

    def total(self) -> float:
        """Return the sum of all parts."""
        return self.propose + self.forward + self.accept + self.commit + self.other


class StepClock:
    """Adds the time since the last mark to a part of the step."""

    def __init__(self, times: StepTimes, device: torch.device) -> None:
        self._times, self._device = times, device
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """Add the time since the last call to a part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        setattr(self._times, part, getattr(self._times, part) + now - self._last)
        self._last = now
