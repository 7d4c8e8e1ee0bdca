"""Time one prompt: this proposer, plain decoding and transformers' own generate, interleaved."""

from __future__ import annotations

from typing import Any

from medhead.bench.measure import Method, measure
from medhead.decoder import Decoder


def compare(decoder: Decoder, token_ids: list[int], sampling: dict[str, Any], seed: int, repeats: int = 5) -> None:
    """Print each method's tokens per second (median of the repeats), their ratios, and whether the texts agree."""
    with Decoder(decoder.target, "none") as plain:
        methods = [
            Method(f"medhead {decoder.proposer.name}", sampling, decoder, seed=seed),
            Method("medhead plain", sampling, plain, seed=seed),
            Method("transformers generate", sampling, model=decoder.model, seed=seed),
        ]
        ours, ours_plain, theirs = results = measure(methods, [token_ids], repeats)
    print(f"{'':24s}{'tokens/s':>10s}{'ratio':>8s}")
    for result in results:
        print(f"{result.name:24s}{result.rate:10.1f}{result.rate / theirs.rate:7.2f}x")
    print(f"accepted length {ours.accepted_length:.2f}; {ours.rate / ours_plain.rate:.2f}x plain decoding")
    print(f"identical to plain decoding: {'no' if ours_plain.mismatches else 'yes'}")
    if not sampling["do_sample"]:
        print(f"identical to transformers:   {'no' if theirs.mismatches else 'yes'}")
