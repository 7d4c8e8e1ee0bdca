"""Interleaved timing: every prompt is answered by every contestant in turn, in an order that rotates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medhead.bench.contestants import Contestant
from medhead.bench.memory import PeakMemory
from medhead.decoder import Statistics

PARTS = ("forward", "propose", "accept", "commit", "other", "whole")


@dataclass
class Measured:
    """What one contestant did.

    Attributes:
        name: contestant.
        dtype: type of its model.
        nodes: nodes of its tree, 0 for what is not ours.
        seconds: of each prompt, median of the repeats.
        tokens: new tokens of each prompt.
        passes: verify passes of each prompt.
        parts: seconds of all steps by part.
        steps: number of steps that `parts` adds up.
        identical: prompts whose text is that of the reference in the same type.
        peak_bytes: most memory that tensors took above the model's own, packed copies of its weights among them.
        cache_bytes: of which the key/value cache.
        packed_bytes: of which packed copies of weights, the model's and the heads'.
    """

    name: str
    dtype: str
    nodes: int = 0
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    identical: int = 0
    peak_bytes: int = 0
    cache_bytes: int = 0
    packed_bytes: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second over all prompts."""
        return sum(self.tokens) / sum(self.seconds)

    @property
    def accepted_length(self) -> float:
        """Tokens per pass over all prompts; 0 for what does not count passes."""
        return sum(self.tokens) / sum(self.passes) if sum(self.passes) else 0.0

    @property
    def overhead(self) -> float:
        """Time of a step outside the target's forward pass, as a share of the forward pass."""
        forward = self.parts.get("forward", 0.0)
        return (sum(self.parts.values()) - forward) / forward if forward else 0.0

    def step_ms(self) -> dict[str, float]:
        """Milliseconds of one step by part."""
        return {part: 1000 * self.parts.get(part, 0.0) / max(self.steps, 1) for part in PARTS}


def faster_types(
    by_type: dict[str, list[Contestant]], prompts: list[Tensor], say: Callable[[str], None], repeats: int = 3
) -> list[Contestant]:
    """Each contestant in the type in which it decodes faster, measured on a few prompts, interleaved."""
    if len(by_type) == 1:
        return next(iter(by_type.values()))
    chosen, named = [], dict[str, list[Contestant]]()
    for one in (one for field_ in by_type.values() for one in field_):
        named.setdefault(one.name, []).append(one)
    for same in named.values():
        if len(same) == 1:  # in one type alone
            chosen.append(same[0])
            continue
        rates: dict[str, list[float]] = {one.dtype: [] for one in same}
        for turn in range(repeats + 1):
            for one in same:
                tokens, seconds = 0, 0.0
                for ids in prompts:
                    began = time.perf_counter()
                    tokens += one.run(ids).shape[1] - ids.shape[1]
                    _synchronize(ids)
                    seconds += time.perf_counter() - began
                if turn:
                    rates[one.dtype].append(tokens / seconds)
        medians = {dtype: statistics.median(values) for dtype, values in rates.items()}
        best = max(same, key=lambda one: medians[one.dtype])
        say(f"{best.name}: " + ", ".join(f"{dtype} {rate:.0f} tokens/s" for dtype, rate in medians.items()))
        chosen.append(best)
    return chosen


def measure(
    field_: list[Contestant],
    references: dict[str, Contestant],
    prompts: list[Tensor],
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Time all contestants on all prompts, interleaved; the texts of the last repeat are compared.

    Args:
        field_: the contestants.
        references: for each type, the one whose text the others' must be (plain decoding); not timed.
        prompts: ids `[1, tokens]` each.
        repeats: runs of each prompt; its time is their median, the time to capture steps taken out.
        progress: called after every run.
    """
    found = [Measured(one.name, one.dtype, one.nodes) for one in field_]
    for one in field_:
        one.run(prompts[0])  # warm up
    for number, ids in enumerate(prompts):
        seconds: list[list[float]] = [[] for _ in field_]
        texts: list[Tensor] = [ids] * len(field_)
        for repeat in range(repeats):
            for turn in range(len(field_)):
                at = (turn + number + repeat) % len(field_)  # nobody is always first
                began = time.perf_counter()
                texts[at] = field_[at].run(ids)
                _synchronize(ids)
                spent, given = time.perf_counter() - began, field_[at].statistics()
                seconds[at].append(spent - (given.capture_seconds if given else 0.0))
                add_statistics(found[at], given)
                progress()
        expected = {dtype: one.run(ids) for dtype, one in references.items()}
        for at, result in enumerate(found):
            result.seconds.append(statistics.median(seconds[at]))
            result.tokens.append(texts[at].shape[1] - ids.shape[1])
            given = field_[at].statistics()
            result.passes.append(given.passes if given else 0)
            result.identical += torch.equal(texts[at], expected[result.dtype])
    for one, result in zip(field_, found, strict=True):
        with PeakMemory() as memory:
            one.run(prompts[0])
        last = one.statistics()
        if last is not None:
            result.cache_bytes, result.packed_bytes = last.cache_bytes, last.packed_bytes
        result.peak_bytes = memory.peak + result.packed_bytes
    return found


def add_statistics(result: Measured, given: Statistics | None) -> None:
    """Add up the time of a run's steps."""
    if given is None:
        return
    for part in PARTS:
        result.parts[part] = result.parts.get(part, 0.0) + getattr(given.times, part)
    result.steps += given.steps


def _synchronize(ids: Tensor) -> None:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
