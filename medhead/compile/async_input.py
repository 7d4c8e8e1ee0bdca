"""How a captured step gets draft tokens that the host made: written to pinned memory, copied on the step's stream."""

from __future__ import annotations

import torch
from torch import Tensor

from medhead.proposers.host_drafts import pack_tries
from medhead.proposers.trie import DraftTrie


class DraftInput:
    """Sends draft tokens to the buffer `[batch, 3, n]` of a captured step.

    The host must have read the output of the last step that was sent any, because the pinned memory is written again.
    """

    def __init__(self, drafts: Tensor) -> None:
        self._drafts = drafts
        self._host = torch.zeros(drafts.shape, dtype=drafts.dtype, pin_memory=drafts.device.type == "cuda")

    def send(self, tries: list[DraftTrie], rows: list[int]) -> None:
        """Send every row of the buffer its draft tokens; `rows` are their places, other rows keep what they have."""
        self._host[torch.tensor(rows)] = pack_tries(tries)
        self._drafts.copy_(self._host, non_blocking=True)
