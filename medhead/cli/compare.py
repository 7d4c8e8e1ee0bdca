"""Time one prompt: this proposer, plain decoding and transformers' own generate, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medhead.decoder import Decoder


def compare(decoder: Decoder, input_ids: Tensor, sampling: dict[str, Any], seed: int, repeats: int = 5) -> None:
    """Print each contestant's tokens per second (median of interleaved runs), ratios, and whether the texts agree."""
    arguments = {**sampling, "attention_mask": torch.ones_like(input_ids)}
    plain = Decoder(decoder.target, "none")

    def transformers_generate() -> Tensor:
        torch.manual_seed(seed)
        return decoder.model.generate(input_ids, **arguments)

    contestants: dict[str, Callable[[], Tensor]] = {
        f"medhead {decoder.proposer.name}": lambda: decoder.generate(input_ids, seed=seed, **arguments),
        "medhead plain": lambda: plain.generate(input_ids, seed=seed, **arguments),
        "transformers generate": transformers_generate,
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    texts: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):  # the first run warms up
        for name, generate in contestants.items():
            began = time.perf_counter()
            texts[name] = generate()
            seconds = time.perf_counter() - began
            if repeat:
                rates[name].append((texts[name].shape[1] - input_ids.shape[1]) / seconds)
    plain.close()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, ours_plain, theirs = medians.values()
    text, plain_text, their_text = texts.values()
    print(f"{'':24s}{'tokens/s':>10s}{'ratio':>8s}")
    for name, rate in medians.items():
        print(f"{name:24s}{rate:10.1f}{rate / theirs:7.2f}x")
    print(f"accepted length {decoder.statistics.accepted_length:.2f}; {ours / ours_plain:.2f}x plain decoding")
    print(f"identical to plain decoding: {'yes' if torch.equal(text, plain_text) else 'no'}")
    if not sampling["do_sample"]:
        print(f"identical to transformers:   {'yes' if torch.equal(text, their_text) else 'no'}")
