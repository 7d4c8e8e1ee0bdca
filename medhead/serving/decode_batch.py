"""A decode loop whose rows are requests of different people, each with its own sampling, noise and end."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from medhead.core.acceptance import TypicalAcceptance
from medhead.core.gumbel import LazyGumbel, chunk_size
from medhead.core.loop import DecodeLoop
from medhead.core.sampling import process_nodes, temperature_of
from medhead.core.sequence import Sequence, Settings
from medhead.core.stopping import StopChecker
from medhead.model.target import Target
from medhead.proposers.base import Proposer


class DecodeBatch(DecodeLoop):
    """Rows with settings of their own (`Sequence.own`), which must have local processors only.

    GumbelNoise of a row is that of row 0 of a generation with its seed: the text it would get alone.

    Args:
        target: the target.
        proposer: what fills the trees of all rows.
        typical: lossy acceptance of all rows, None for exact decoding.

    Attributes:
        used: seconds that its turns have taken, for taking turns.
    """

    def __init__(self, target: Target, proposer: Proposer, typical: TypicalAcceptance | None = None) -> None:
        nothing = StopChecker(StoppingCriteriaList(), 1, target.device)
        synchronize = torch.cuda.synchronize if target.device.type == "cuda" else None
        super().__init__(
            target, proposer, Settings(LogitsProcessorList(), nothing, typical=typical, synchronize=synchronize)
        )
        self.used = 0.0

    def keep(self, places: list[int]) -> None:
        """Only the rows at these places go on; an empty lane holds no cache."""
        super().keep(places)
        if not self.rows and hasattr(self, "cache"):
            del self.cache

    def _noise(self, rows: list[Sequence]) -> LazyGumbel | None:
        """GumbelNoise of the rows that sample, zeros for those that do not."""
        sources = [(self._settings(row).noise, len(row.text)) for row in rows]
        if all(noise is None for noise, _ in sources):
            return None
        device = self.target.device
        first = torch.zeros(1, dtype=torch.long, device=device)

        def make(begin: int, end: int) -> Tensor:
            zeros = torch.zeros(end - begin, self.target.vocab_size, device=device)
            ahead = torch.arange(begin, end, device=device)
            return torch.stack(
                [zeros if noise is None else noise.gumbel(first, ahead + length) for noise, length in sources]
            )

        return LazyGumbel(make, self._depth_limit(rows) + 1, chunk_size(len(rows), self.target.vocab_size, device))

    def _temperature(self, rows: list[Sequence]) -> float | Tensor:
        found = [temperature_of(self._settings(row).processors) for row in rows]
        return found[0] if len(set(found)) == 1 else torch.tensor(found, device=self.target.device)[:, None, None]

    def _score(self, rows: list[Sequence], logits: Tensor) -> Tensor:
        lists = [self._settings(row).processors for row in rows]
        if not any(lists):
            return logits
        return torch.cat(
            [process_nodes(own, logits[place : place + 1]) if own else logits[place : place + 1].float()
             for place, own in enumerate(lists)]
        )  # fmt: skip
