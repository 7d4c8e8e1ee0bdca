"""Batches of requests by proposer, and whose turn it is.

Requests that ask for the same proposer and tree size are decoded together, as one batch. Batches take turns: the one with the
least service time goes first, so a batch of slow steps does not starve the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence
from medhead.decoder import Decoder
from medhead.heads import Heads
from medhead.proposers.base import Proposer, build_proposer
from medhead.serving.prefix_store import PrefixStore
from medhead.serving.prompts import PromptQueue
from medhead.serving.request import Request

MAX_BATCHES = 8  # idle batches beyond these are dropped, with what their proposers learnt
Key = tuple[str | None, int | None]


@dataclass(eq=False)
class DecodeBatch:
    """The sequences that one proposer serves."""

    loop: DecodeLoop  # decodes them
    prompts: PromptQueue  # reads their prompts
    service_time: float = 0.0  # seconds that its turns have taken

    @property
    def sequences(self) -> list[Sequence]:
        """The running sequences."""
        return self.loop.sequences

    @property
    def all_sequences(self) -> list[Sequence]:
        """The running sequences, and those whose prompts are being read."""
        return [*self.sequences, *self.prompts.sequences]

    @property
    def is_busy(self) -> bool:
        """Whether a sequence runs or its prompt is being read."""
        return bool(self.sequences or self.prompts)


class Scheduler:
    """Keeps the batches of an engine.

    Args:
        decoder: its proposer serves requests that name none.
        heads: for requests that name the proposers `heads` or `hybrid`: heads or their folder, or None.
        prefixes: the beginnings of texts that need not be read.
    """

    def __init__(self, decoder: Decoder, heads: Heads | str | None, prefixes: PrefixStore) -> None:
        self._decoder, self._heads, self._prefixes = decoder, heads, prefixes
        self._batches: OrderedDict[Key, DecodeBatch] = OrderedDict()

    def __iter__(self) -> Iterator[DecodeBatch]:
        return iter(list(self._batches.values()))

    def batch_for(self, request: Request) -> DecodeBatch:
        """Return the batch that serves a request, made now unless there is one.

        Raises:
            MedheadError: the proposer cannot be made.
        """
        own = request.proposer in (None, self._decoder.proposer.name)
        key: Key = (None if own else request.proposer, request.tree_size)
        if key not in self._batches:
            loop = self._decoder.new_loop(proposer=self._proposer(key))
            self._batches[key] = DecodeBatch(loop, PromptQueue(loop, self._prefixes))
        self._batches.move_to_end(key)
        for other in [k for k, batch in self._batches.items() if not batch.is_busy and k != key]:
            if len(self._batches) > MAX_BATCHES:
                del self._batches[other]
        return self._batches[key]

    def admit(self, batch: DecodeBatch) -> None:
        """Note that a batch gets sequences; the time during which it was idle is no credit."""
        others = [other.service_time for other in self if other.is_busy and other is not batch]
        if not batch.is_busy and others:
            batch.service_time = max(batch.service_time, min(others))

    def next_batch(self) -> DecodeBatch | None:
        """Return the batch whose turn it is, None if all are idle."""
        return min((batch for batch in self if batch.is_busy), key=lambda batch: batch.service_time, default=None)

    def charge(self, batch: DecodeBatch, seconds: float) -> None:
        """Note that a turn of a batch took so many seconds."""
        batch.service_time += seconds

    def drop(self, batch: DecodeBatch) -> None:
        """Forget a batch that failed; its state may be anything."""
        self._batches = OrderedDict((key, other) for key, other in self._batches.items() if other is not batch)

    def _proposer(self, key: Key) -> Proposer:
        name, size = key
        if name is None and size is None:
            return self._decoder.proposer
        name = name or self._decoder.proposer.name
        options = {"heads": self._heads} if name in ("heads", "hybrid") and self._heads is not None else {}
        return build_proposer(name, self._decoder.target, tree_size=None if name == "none" else size, **options)
