"""Time one prompt: this proposer, plain decoding and transformers' own generate, interleaved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from medhead.bench.measure import Method, MethodResult, measure, warm_up
from medhead.decoder import Decoder

REPEATS = 5
RUNS = 3 * (1 + REPEATS)  # every method answers once to warm up


def compare(
    decoder: Decoder, token_ids: list[int], sampling: dict[str, Any], seed: int, progress: Callable[[int], object]
) -> list[MethodResult]:
    """Return what this decoder, plain decoding and transformers did; `progress` is called with 1 after every run.

    The decoder must have answered the prompt once before, which is its warm-up.
    """
    with Decoder(decoder.target, "none") as plain:
        methods = [
            Method(f"medhead {decoder.proposer.name}", sampling, decoder, seed=seed),
            Method("medhead plain", sampling, plain, seed=seed),
            Method("transformers generate", sampling, model=decoder.model, seed=seed),
        ]
        for method in methods[1:]:
            warm_up([method], [token_ids])
            progress(1)
        return measure(methods, [token_ids], REPEATS, warm=False, progress=progress)


def table(results: list[MethodResult], is_greedy: bool) -> str:
    """Return each method's tokens per second (median of the repeats), their ratios, and whether the texts agree."""
    ours, plain, theirs = results
    lines = [f"{'':24s}{'tokens/s':>10s}{'ratio':>8s}"]
    lines += [f"{one.name:24s}{one.rate:10.1f}{one.rate / theirs.rate:7.2f}x" for one in results]
    lines.append(f"accepted length {ours.accepted_length:.2f}; {ours.rate / plain.rate:.2f}x plain decoding")
    lines.append(f"identical to plain decoding: {'no' if plain.mismatches else 'yes'}")
    if is_greedy:
        lines.append(f"identical to transformers:   {'no' if theirs.mismatches else 'yes'}")
    return "\n".join(lines)


def to_json(results: list[MethodResult], is_greedy: bool) -> dict[str, Any]:
    """Return the content of `table` for JSON; texts of transformers are compared only if decoding is greedy."""
    theirs = results[-1]
    return {
        one.name: {"tokens_per_second": round(one.rate, 2), "ratio": round(one.rate / theirs.rate, 4)}
        | ({"identical": not one.mismatches} if one is not theirs or is_greedy else {})
        for one in results
    }
