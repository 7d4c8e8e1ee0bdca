"""Real text: SmolLM2-135M-Instruct, with its heads where there are some, beside transformers; else the demo model.

SMOLLM2 and SMOLLM2_HEADS are folders. Every decoder's text is compared with that of plain decoding.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, DTYPE, ON_GPU, TINY, attempt, say
from torch import Tensor

from medhead import Decoder
from medhead.bench.measure import synchronize
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer

NEW_TOKENS = 8 if TINY else 128
PROMPT = "Explain in a few sentences why the sky is blue, and then write a Python function that adds two numbers."
STEP = "graph" if ON_GPU else "eager"


def timed(generate: Any, ids: Tensor, plain: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """Return the text, and tokens per second of the second run."""
    generate()
    synchronize(DEVICE)
    began = time.perf_counter()
    text: Tensor = generate()
    synchronize(DEVICE)
    rate = round((text.shape[1] - ids.shape[1]) / (time.perf_counter() - began), 1)
    return text, {"tokens_per_second": rate, "same_text": None if plain is None else torch.equal(text, plain)}


def decoders(heads: Path | None) -> dict[str, dict[str, Any]]:
    """Return the arguments of every decoder, by name."""
    with_heads: dict[str, Any] = {} if heads is None else {"heads": heads}
    found: dict[str, dict[str, Any]] = {
        "plain, loop": {"proposer": "none", "step": "loop"},
        f"plain, {STEP}": {"proposer": "none", "step": STEP},
        f"plain, {STEP}, the model's own modules": {"proposer": "none", "step": STEP, "fused": False},
        "hybrid, loop": {"proposer": "hybrid", "step": "loop", **with_heads},
        f"hybrid, {STEP}": {"proposer": "hybrid", "step": STEP, **with_heads},
    }
    if heads is not None:
        found |= {"heads, loop": {"proposer": "heads", "step": "loop", **with_heads}}
        found |= {f"heads, {STEP}": {"proposer": "heads", "step": STEP, **with_heads}}
    return found


class Ways:
    """The ways to decode one prompt with one model."""

    def __init__(self, name: str, folder: Path, heads: Path | None) -> None:
        self.name, self.heads, self.model = name, heads, load_model(folder, DEVICE, DTYPE)
        self.ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids.to(DEVICE)

    def transformers(self, **options: Any) -> dict[str, Any]:
        """Measure `generate` without medhead."""
        limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None, "do_sample": False}
        given: dict[str, Any] = {"attention_mask": torch.ones_like(self.ids), **limits, **options}
        return timed(lambda: self.model.generate(self.ids, **given), self.ids, None)[1]

    def medhead(self, options: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
        """Measure one decoder; the first one's text is what the others are compared with."""
        decoder = Decoder(self.model, **options)
        given = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, **sampling}
        text, found = timed(lambda: decoder.generate(self.ids, **given), self.ids, self.plain)
        self.plain = text if self.plain is None else self.plain
        statistics = decoder.statistics
        decoder.close()
        steps = {"captured_steps": statistics.captured_steps, "steps": statistics.steps}
        return {**found, "accepted_length": round(statistics.accepted_length, 2), **steps}

    def measure(self) -> None:
        """Print every way, greedy and sampled."""
        attempt("transformers, eager", self.transformers, model=self.name)
        if ON_GPU:  # with a static cache transformers compiles its forward pass
            compiled = partial(self.transformers, cache_implementation="static")
            attempt("transformers, static cache, compiled", compiled, model=self.name)
        for sampling in ({}, {"do_sample": True, "seed": 3, "temperature": 1.0}):
            self.plain: Tensor | None = None
            for way, options in decoders(self.heads).items():
                attempt(way, partial(self.medhead, options, sampling), model=self.name, sampled=bool(sampling))


folder, heads = (os.environ.get(name) for name in ("SMOLLM2", "SMOLLM2_HEADS"))
if folder and Path(folder).is_dir():
    if not (heads and Path(heads).is_dir()):
        say(skipped="the heads of SmolLM2: SMOLLM2_HEADS names no folder")
    Ways("SmolLM2-135M-Instruct", Path(folder), Path(heads) if heads and Path(heads).is_dir() else None).measure()
else:
    say(skipped="SmolLM2: SMOLLM2 names no folder")
Ways("demo", DEMO_MODEL, DEMO_HEADS).measure()
