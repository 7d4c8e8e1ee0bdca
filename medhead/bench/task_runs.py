"""Running proposers over the prompts of a task, interleaved with plain decoding, in batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from medhead.bench.prompts import padded
from medhead.decoder import Decoder
from medhead.heads import Heads
from medhead.model.target import Target
from medhead.proposers import Proposer, build_proposer

PLAIN = "none"


@dataclass(frozen=True)
class Setting:
    """How answers are made.

    Attributes:
        temperature: 0 is greedy.
        batch: prompts decoded together.
        new_tokens: most tokens of an answer.
        repeats: runs of everything, each with proposers that know nothing yet; their median time counts.
        seed: of the sampling.
    """

    temperature: float = 0.0
    batch: int = 1
    new_tokens: int = 120
    repeats: int = 1
    seed: int = 0

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return options | {"seed": self.seed}


@dataclass
class Tally:
    """What one proposer did on one task.

    Attributes:
        proposer: its name.
        nodes: of its tree, root included; the most it may have.
        members: of a hybrid.
        tokens: emitted for every prompt, all repeats together.
        passes: verify passes of every prompt, all repeats together.
        seconds: of every batch with its prefill, medians of the repeats.
        steps: passes of batches, all repeats together.
        decode, propose, forward: seconds of these steps, all of it and two parts.
        different: prompts whose text was another one than plain decoding's.
    """

    proposer: str
    nodes: int = 1
    members: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    decode: float = 0.0
    propose: float = 0.0
    forward: float = 0.0
    different: int = 0


class Field:
    """Everybody who takes part: plain decoding first, then the proposers.

    Args:
        target: the model.
        proposers: their names.
        heads: for `heads` and `hybrid`.
        tree_size: nodes of every tree; each one's own if None.

    Raises:
        MedheadError: a proposer cannot be made.
    """

    def __init__(
        self, target: Target, proposers: Sequence[str], heads: Heads | None = None, tree_size: int | None = None
    ) -> None:
        self.target, self.tree_size = target, tree_size
        self.names = (PLAIN, *proposers)
        self.options: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        if heads is not None:
            made: Any = build_proposer("heads", target, heads=heads)
            known = {"heads": heads, "dtype": made.output_head.dtype}  # the faster type is measured once
            self.options |= {name: known for name in ("heads", "hybrid") if name in self.options}
        for name in self.names:
            self.make(name)

    def make(self, name: str) -> Proposer:
        """A proposer that has seen nothing."""
        size = None if name == PLAIN else self.tree_size
        return build_proposer(name, self.target, tree_size=size, **self.options[name])

    def warm_up(self, prompts: list[list[int]], setting: Setting) -> None:
        """Everybody decodes a little, unmeasured: kernels, memory, and the costs that budgets are chosen by.

        Those are kept for 1, 2, 4 ... rows, and batches shrink when answers end.
        """
        sizes = [1 << power for power in range(setting.batch.bit_length())]
        for size in dict.fromkeys((*sizes, setting.batch)):
            ids, mask = padded((prompts * size)[:size], self.target.device)
            for name in self.names:
                decoder = Decoder(self.target, self.make(name))
                decoder.generate(ids, attention_mask=mask, **(setting.sampling() | {"max_new_tokens": 4}))

    def run(self, prompts: list[list[int]], setting: Setting, progress: Callable[[int], None]) -> list[Tally]:
        """All proposers on all prompts, batch by batch in an order that rotates.

        Args:
            prompts: of one task.
            setting: how.
            progress: called with the number of answers after every run.
        """
        count = len(self.names)
        found = [_tally(name, self.make(name)) for name in self.names]
        starts = range(0, len(prompts), setting.batch)
        seconds: list[list[list[float]]] = [[[] for _ in starts] for _ in found]
        differ: list[set[int]] = [set() for _ in found]
        for repeat in range(setting.repeats):
            decoders = [Decoder(self.target, self.make(name)) for name in self.names]
            for turn, start in enumerate(starts):
                part = prompts[start : start + setting.batch]
                texts: list[list[list[int]]] = [[] for _ in found]
                for place in range(count):
                    at = (place + turn + repeat) % count  # nobody is always first
                    texts[at], spent = _answer(decoders[at], part, setting, found[at])
                    seconds[at][turn].append(spent)
                    progress(len(part))
                for at in range(count):
                    pairs = enumerate(zip(texts[at], texts[0], strict=True))
                    differ[at] |= {start + row for row, (mine, plain) in pairs if mine != plain}
        for tally, times, wrong in zip(found, seconds, differ, strict=True):
            tally.seconds = [statistics.median(each) for each in times]
            tally.different = len(wrong)
            of_prompts = range(len(prompts))
            tally.tokens, tally.passes = (
                [sum(all_[place :: len(prompts)]) for place in of_prompts] for all_ in (tally.tokens, tally.passes)
            )
        return found


def _tally(name: str, proposer: Proposer) -> Tally:
    members = tuple(member.name for member in getattr(proposer, "members", ()))
    return Tally(name, proposer.tree_size, members)


def _answer(decoder: Decoder, part: list[list[int]], setting: Setting, tally: Tally) -> tuple[list[list[int]], float]:
    """Answer some prompts together; the texts and the seconds."""
    passes, texts = [0] * len(part), [[] for _ in part]  # type: ignore[var-annotated]

    def count(row: Any, new: list[int]) -> None:
        passes[row.index] += 1
        texts[row.index] += new

    ids, mask = padded(part, decoder.target.device)
    decoder.on_pass = count
    began = time.perf_counter()
    decoder.generate(ids, attention_mask=mask, **setting.sampling())
    if decoder.synchronize is not None:
        decoder.synchronize()
    spent = time.perf_counter() - began
    given = decoder.statistics
    tally.tokens += map(len, texts)
    tally.passes += passes
    tally.steps += given.steps
    tally.decode += given.decode_seconds
    tally.propose += given.times.propose
    tally.forward += given.times.forward
    return texts, spent
