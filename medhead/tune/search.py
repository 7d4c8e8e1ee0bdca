"""Coordinate search: the fastest of many settings, found by measuring one dimension after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from medhead.bench.harness import progress_bar
from medhead.bench.measure import Method, Prompts, measure
from medhead.decoder import Decoder

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


def throughput(make: Callable[[T], Decoder], prompts: Prompts, arguments: dict[str, Any], repeats: int) -> Rate[T]:
    """Return a function that measures decoding of the prompts, interleaved.

    Args:
        make: makes a setting's decoder.
        prompts: token ids.
        arguments: of `generate`.
        repeats: how often each prompt is answered.
    """

    def rate(settings: list[T]) -> list[float]:
        methods = [Method(str(setting), arguments, make(setting)) for setting in settings]
        with progress_bar(len(methods) * len(prompts) * repeats) as bar:
            return [result.rate for result in measure(methods, prompts, repeats, progress=bar.update)]

    return rate
