"""Coordinate search: the fastest of many settings, found by measuring one dimension after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from medhead.bench.harness import progress_bar
from medhead.bench.measure import Method, Prompts, measure
from medhead.config import SamplingParams
from medhead.decoder import Decoder
from medhead.generation_config import generate_arguments

T = TypeVar("T")
Changes = list[Callable[[T], T]]  # the steps along one dimension
Rate = Callable[[list[T]], list[float]]  # tokens per second of several settings, measured side by side


def coordinate_search(start: T, dimensions: Iterable[Changes[T]], rate: Rate[T], say: Callable[[str], None]) -> T:
    """Return the fastest setting; each dimension starts from the best so far, and `say` is told every result."""
    best = start
    for changes in dimensions:
        settings = list(dict.fromkeys([best, *(change(best) for change in changes)]))
        rates = rate(settings)
        for setting, value in zip(settings, rates, strict=True):
            say(f"  {setting}: {value:.1f} tokens/s")
        best = settings[max(range(len(settings)), key=rates.__getitem__)]
    return best


def throughput(make: Callable[[T], Decoder], prompts: Prompts, new_tokens: int, repeats: int) -> Rate[T]:
    """Return a function that measures greedy decoding of the prompts, interleaved; `make` makes a setting's decoder."""

    def rate(settings: list[T]) -> list[float]:
        params, decoders = SamplingParams(new_tokens, 0.0), [(str(setting), make(setting)) for setting in settings]
        methods = [Method(name, generate_arguments(one.model, params), one) for name, one in decoders]
        with progress_bar(len(methods) * len(prompts) * repeats) as bar:
            return [result.rate for result in measure(methods, prompts, repeats, progress=bar.update)]

    return rate
