"""The update with the largest held-out accepted length: its weights are kept, and training stops when none is better for long.

The accepted length is what heads are for; the held-out loss turns up earlier, when they are only surer of what they draft.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RECORD = "best.json"


class BestUpdate:
    """The best evaluation of a run, recorded in its folder; `step` is -1 before the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.step, self.length, self.stopped = folder, -1, 0.0, -1
        record = folder / RECORD
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8"))
            self.step, self.length, self.stopped = found["step"], found["length"], found["stopped"]

    def offer(
        self, step: int, length: float, weights: Callable[[], dict[str, Tensor]], limit: int, write: bool
    ) -> bool:
        """Record an evaluation, and return whether the best one is at least `limit` updates ago.

        A run that resumes from an earlier checkpoint makes the same evaluations again, which changes nothing.
        """
        if length > self.length or self.step < 0:
            self.step, self.length = step, length
            if write:
                old = set(self.folder.glob("best-*.safetensors"))
                save_file(weights(), self._weights_file())
                self._write_record()
                for path in old - {self._weights_file()}:
                    path.unlink()
        if step - self.step < limit:
            return False
        self.stopped = step
        if write:
            self._write_record()
        return True

    def weights(self) -> dict[str, Tensor] | None:
        """Return the best update's trained parameters, None before the first evaluation."""
        return load_file(self._weights_file()) if self.step >= 0 else None

    def forget(self) -> None:
        """Delete the record of a run that starts from its beginning."""
        (self.folder / RECORD).unlink(missing_ok=True)
        for path in self.folder.glob("best-*.safetensors"):
            path.unlink()
        self.step, self.length, self.stopped = -1, 0.0, -1

    def _weights_file(self) -> Path:
        return self.folder / f"best-{self.step}.safetensors"

    def _write_record(self) -> None:
        temporary = self.folder / f".{RECORD}"
        facts = {"step": self.step, "length": self.length, "stopped": self.stopped}
        temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        temporary.replace(self.folder / RECORD)
