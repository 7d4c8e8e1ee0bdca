"""Coordinate search: the fastest of many settings, found by measuring one dimension after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from medhead.bench.command import Progress
from medhead.bench.contestants import Contestant
from medhead.bench.measure import measure
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


def throughput(make: Callable[[T], Decoder], prompts: list[Tensor], new_tokens: int, repeats: int) -> Rate[T]:
    """Return a function that measures greedy decoding of the prompts, interleaved; `make` makes a setting's decoder."""

    def contestant(setting: T) -> Contestant:
        decoder = make(setting)

        def run(ids: Tensor) -> Tensor:
            return decoder.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
            )

        return Contestant(str(setting), "", run, lambda: decoder.statistics, decoder.proposer.tree_size)

    def rate(settings: list[T]) -> list[float]:
        runners = [contestant(setting) for setting in settings]
        progress = Progress(len(runners) * len(prompts) * repeats)
        return [found.rate for found in measure(runners, {"": runners[0]}, prompts, repeats, progress)]

    return rate
