"""Continuous batching of a stream of sequences: when some end, the next ones take their places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence


def decode_stream(loop: DecodeLoop, sequences: Iterator[Sequence], batch_size: int) -> Iterator[Sequence]:
    """Decode sequences, at most `batch_size` at a time, and yield each as it ends.

    Prompts are read together once an eighth of the places is free, because every join copies the cache. The target must be
    active while the iterator runs, see `Target.active`.
    """
    group = max(1, batch_size // 8)
    while True:
        free, running = batch_size - len(loop.sequences), loop.sequences
        if (free >= group or not running) and (joining := list(islice(sequences, free))):
            running = [*running, *joining]
            loop.join(joining)  # captured steps hand on what they still have: sequences may end here
        if not running:
            return
        loop.step()
        left = {id(one) for one in loop.sequences}
        yield from (one for one in running if id(one) not in left)
