"""The fastest of many settings, found by measuring: one dimension after the other, each from the best so far."""

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
Changes = list[Callable[[T], T]]  # of one dimension
Rate = Callable[[list[T]], list[float]]


def search(start: T, dimensions: Iterable[Changes[T]], rate: Rate[T], say: Callable[[str], None]) -> T:
    """The fastest setting by coordinates.

    Args:
        start: where to begin.
        dimensions: for each one the changes to try.
        rate: tokens a second of several settings, measured side by side.
        say: told every result.
    """
    best = start
    for changes in dimensions:
        settings = list(dict.fromkeys([best, *(change(best) for change in changes)]))
        rates = rate(settings)
        for setting, value in zip(settings, rates, strict=True):
            say(f"  {setting}: {value:.1f} tokens/s")
        best = settings[max(range(len(settings)), key=lambda place: rates[place])]
    return best


def measured(make: Callable[[T], Decoder], prompts: list[Tensor], new_tokens: int, repeats: int) -> Rate[T]:
    """A function that measures settings on prompts, interleaved, greedily; `make` makes the decoder of one."""

    def rate(settings: list[T]) -> list[float]:
        runners = []
        for setting in settings:
            decoder = make(setting)

            def run(ids: Tensor, decoder: Decoder = decoder) -> Tensor:
                return decoder.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
                )

            statistics = lambda decoder=decoder: decoder.statistics  # noqa: E731
            runners.append(Contestant(str(setting), "", run, statistics, decoder.proposer.tree_size))
        progress = Progress(len(runners) * len(prompts) * repeats)
        return [found.rate for found in measure(runners, {"": runners[0]}, prompts, repeats, progress)]

    return rate
