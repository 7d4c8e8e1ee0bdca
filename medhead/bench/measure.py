"""Interleaved timing: every decoding method answers every batch of prompts in turn, in an order that rotates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from medhead.bench.memory import PeakMemory
from medhead.bench.prompts import padded
from medhead.decoder import Decoder

PARTS = ("forward", "propose", "accept", "commit", "other", "whole")
Prompts = list[list[int]]


@dataclass
class Answer:
    """The new token ids and verify passes of every prompt of a batch, and the seconds with prefill, without capture."""

    texts: list[list[int]]
    passes: list[int]
    seconds: float


@dataclass(eq=False)
class Method:
    """A decoding method: a `Decoder`, or transformers' `generate` of a model."""

    name: str
    arguments: dict[str, Any]  # of `generate`
    decoder: Decoder | None = None
    model: PreTrainedModel | None = None
    seed: int = 0
    make: Callable[[], Decoder] | None = None  # makes a decoder that has seen no answer, before every repeat

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget earlier answers."""
        if self.make is not None:
            self.decoder = self.make()

    @property
    def dtype(self) -> str:
        """Name of the model's data type."""
        model: Any = self.model if self.decoder is None else self.decoder.target
        return str(model.dtype).removeprefix("torch.")

    @property
    def tree_size(self) -> int:
        """Nodes of the tree; 0 for transformers' `generate`."""
        return 0 if self.decoder is None else self.decoder.proposer.tree_size

    def answer(self, prompts: Prompts, **changes: Any) -> Answer:
        """Answer prompts together; `changes` replace arguments of `generate`."""
        if self.decoder is not None:
            return answer(self.decoder, prompts, seed=self.seed, **(self.arguments | changes))
        model: Any = self.model
        ids, mask = padded(prompts, model.device)
        torch.manual_seed(self.seed)
        began = time.perf_counter()
        output = model.generate(ids, attention_mask=mask, **(self.arguments | changes))
        synchronize(ids.device)
        seconds = time.perf_counter() - began
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        texts = [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
        return Answer(texts, [0] * len(prompts), seconds)


def answer(decoder: Decoder, prompts: Prompts, **arguments: Any) -> Answer:
    """Answer prompts together with a decoder; `arguments` are those of `generate`."""
    ids, mask = padded(prompts, decoder.target.device)
    texts: list[list[int]] = [[] for _ in prompts]
    passes = [0] * len(prompts)

    def count(sequence: Any, new: list[int]) -> None:
        passes[sequence.index] += 1
        texts[sequence.index] += new

    decoder.on_pass = count
    began = time.perf_counter()
    decoder.generate(ids, attention_mask=mask, **arguments)
    synchronize(ids.device)
    seconds = time.perf_counter() - began - decoder.statistics.capture_seconds
    decoder.on_pass = None
    return Answer(texts, passes, seconds)


def _until_end(row: list[int], ends: set[int | None]) -> list[int]:
    """Return a row of `generate` without the padding after its end token."""
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock on the host times its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class MethodResult:
    """What one method did with all prompts; counts are sums over all repeats."""

    name: str
    dtype: str = ""
    tree_size: int = 1  # of its tree, root included; 0 for transformers
    members: tuple[str, ...] = ()  # proposers that a hybrid combines
    repeats: int = 1
    new_tokens: list[int] = field(default_factory=list)  # of every prompt
    passes: list[int] = field(default_factory=list)  # verify passes of every prompt; 0 for transformers
    seconds: list[float] = field(default_factory=list)  # of every batch with its prefill, median of the repeats
    steps: int = 0  # verify passes of batches
    decode_seconds: float = 0.0  # of these steps
    parts: dict[str, float] = field(default_factory=dict)  # seconds of profiled steps; `whole` for captured steps
    profiled_steps: int = 0
    mismatches: int = 0  # prompts whose text differs from the reference's
    peak_bytes: int = 0  # of tensors above the model's own, packed copies of weights included
    cache_bytes: int = 0  # the key/value cache's part of the peak
    packed_bytes: int = 0  # the part of packed copies of weights

    def add(self, answer: Answer, first: int, decoder: Decoder | None) -> None:
        """Count an answer to the prompts from number `first` on."""
        for prompt, (text, passes) in enumerate(zip(answer.texts, answer.passes, strict=True), start=first):
            self.new_tokens[prompt] += len(text)
            self.passes[prompt] += passes
        if decoder is not None:
            self.steps += decoder.statistics.steps
            self.decode_seconds += decoder.statistics.decode_seconds

    @property
    def rate(self) -> float:
        """Tokens per second over all prompts."""
        return sum(self.new_tokens) / self.repeats / sum(self.seconds)

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per verify pass over all prompts, bonus token included; 0 for transformers."""
        return sum(self.new_tokens) / sum(self.passes) if sum(self.passes) else 0.0

    @property
    def accepted_length_by_prompt(self) -> list[float]:
        """The same for every prompt; empty for transformers."""
        return [round(t / p, 2) for t, p in zip(self.new_tokens, self.passes, strict=True) if p]

    @property
    def overhead(self) -> float:
        """Time of a step outside the forward pass, as a share of the forward pass."""
        forward = self.parts.get("forward", 0.0)
        return (sum(self.parts.values()) - forward) / forward if forward else 0.0

    def parts_ms(self) -> dict[str, float]:
        """Return the milliseconds of one step by part."""
        return {part: 1000 * self.parts.get(part, 0.0) / max(self.profiled_steps, 1) for part in PARTS}


def measure(
    methods: list[Method],
    prompts: Prompts,
    repeats: int = 1,
    *,
    batch_size: int = 1,  # prompts that are decoded together
    references: dict[str, Method] | None = None,  # by data type: whose texts are expected; None: the first method's
    warm: bool = True,  # answer the first batch without timing it before
    profile: int = 0,  # batches that every decoder answers once more, untimed, to know the parts of its steps
    memory: bool = False,  # measure peak memory too, on the first batch
    progress: Callable[[int], object] = lambda answers: None,  # called with the prompts of every timed answer
) -> list[MethodResult]:
    """Time all methods on all prompts, interleaved, and compare their texts; return one result for each method."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    zeros, results = [0] * len(prompts), list[MethodResult]()
    for method in methods:
        members = getattr(method.decoder.proposer, "members", ()) if method.decoder is not None else ()
        names = tuple(member.name for member in members)
        results.append(MethodResult(method.name, method.dtype, method.tree_size, names, repeats, zeros[:], zeros[:]))
    seconds: list[list[list[float]]] = [[[] for _ in batches] for _ in methods]
    mismatched: list[set[int]] = [set() for _ in methods]

    @cache
    def untimed_texts(reference: Method, number: int) -> list[list[int]]:
        return reference.answer(batches[number]).texts

    if warm:
        warm_up(methods, prompts[:batch_size], batch_size)
    for repeat in range(repeats):
        for method in methods:
            method.reset()
        for number, batch in enumerate(batches):
            first, texts = number * batch_size, dict[Method, list[list[int]]]()
            for turn in range(len(methods)):
                at = (turn + number + repeat) % len(methods)  # no method is always the first
                given = methods[at].answer(batch)
                texts[methods[at]] = given.texts
                seconds[at][number].append(given.seconds)
                results[at].add(given, first, methods[at].decoder)
                progress(len(batch))
            for at, method in enumerate(methods):
                reference = methods[0] if references is None else references[method.dtype]
                expected = texts[reference] if reference in texts else untimed_texts(reference, number)
                pairs = enumerate(zip(texts[method], expected, strict=True), start=first)
                mismatched[at] |= {prompt for prompt, (text, other) in pairs if text != other}
    for at, (method, result) in enumerate(zip(methods, results, strict=True)):
        result.seconds = [statistics.median(times) for times in seconds[at]]
        result.mismatches = len(mismatched[at])
        if profile and method.decoder is not None:
            _profile(result, method.decoder, batches[:profile], seed=method.seed, **method.arguments)
        if memory:
            with PeakMemory() as most:
                method.answer(batches[0])
            if method.decoder is not None:
                found = method.decoder.statistics
                result.cache_bytes, result.packed_bytes = found.cache_bytes, found.packed_bytes
            result.peak_bytes = most.peak + result.packed_bytes
    return results


def warm_up(methods: list[Method], prompts: Prompts, batch_size: int = 1, **changes: Any) -> None:
    """Let every method answer prompts untimed: kernels and memory are then ready, and the costs of passes measured.

    Those costs are kept for 1, 2, 4, ... sequences, and a batch shrinks when answers end, so all these sizes run.
    """
    for size in dict.fromkeys((*(1 << power for power in range(batch_size.bit_length())), batch_size)):
        for method in methods:
            method.answer((prompts * size)[:size], **changes)


def _profile(result: MethodResult, decoder: Decoder, batches: list[Prompts], **arguments: Any) -> None:
    """Time the parts of steps; a captured step has no parts."""
    if decoder.graphs is not None:
        result.parts, result.profiled_steps = {"whole": result.decode_seconds}, result.steps
        return
    result.parts, decoder.profile = dict.fromkeys(PARTS, 0.0), True
    for batch in batches:
        answer(decoder, batch, **arguments)
        result.profiled_steps += decoder.statistics.steps
        for part in PARTS[:-1]:
            result.parts[part] += getattr(decoder.statistics.times, part)
    decoder.profile = False
