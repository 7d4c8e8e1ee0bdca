"""`exact="bitwise"` on a GPU, where it is switched off until this has run: which texts are equal, and what it costs.

SMOLLM2 is a folder; without it the model has random weights. On a CPU this measures the form for CPUs.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from measure import CONTEXT, DEVICE, DTYPE, TINY, attempt, milliseconds, say
from torch import Tensor

from medhead import Decoder
from medhead.bench.captured_steps import eager_steps
from medhead.bench.step import build
from medhead.model.bitwise import UNPROVEN
from medhead.model.loading import load_model
from medhead.model.target import Target

PROPOSERS = ("ngram", "recycling", "hybrid")
NODES = [4] if TINY else [16, 64]
NEW_TOKENS = 8 if TINY else 48


def equal_texts(target: Target, prompts: list[Tensor], sampling: dict[str, Any]) -> dict[str, Any]:
    """Return how many texts of every proposer are those of plain decoding."""
    given = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "do_sample": False} | sampling
    plain, found = Decoder(target, "none", step="loop"), {}
    expected = [plain.generate(ids, **given) for ids in prompts]
    for name in PROPOSERS:
        decoder = Decoder(target, name, step="loop")
        pairs = zip(prompts, expected, strict=True)
        found[name] = sum(torch.equal(decoder.generate(ids, **given), text) for ids, text in pairs)
    return {"texts": len(prompts), **found}


def steps_of(target: Target) -> dict[str, float]:
    """Return the milliseconds of eager steps of plain decoding and of trees."""
    ids = torch.randint(3, target.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    return {name: milliseconds(step) for name, step in eager_steps(target, ids.to(DEVICE), NODES)}


def cost(model: Any, exact: Target) -> dict[str, Any]:
    """Return the times of steps, and what the promise adds to them in percent."""
    without, found = steps_of(Target(model)), steps_of(exact)
    percent = {name: round(100 * (ms / without[name] - 1), 1) for name, ms in found.items()}
    return {"ms": found, "ms_without": without, "cost_percent": percent}


def main() -> None:
    """Measure one model."""
    os.environ[UNPROVEN] = "1"
    folder = os.environ.get("SMOLLM2")
    named = bool(folder and Path(folder).is_dir())
    model = load_model(folder, DEVICE, DTYPE) if named else build(measure.SHAPE, DEVICE, DTYPE)
    say(model="SmolLM2" if named else measure.SHAPE)
    attempt("equal texts and cost", partial(parts, model))


def parts(model: Any) -> dict[str, Any]:
    """Prove the promise, and measure cost and texts of one model; every part is said as it is done."""
    target = Target(model, exact="bitwise")
    assert target.bitwise is not None
    attempt("cost", partial(cost, model, target), context=CONTEXT)
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 20) if TINY else (60, 300, 511, 1000)
    prompts = [torch.randint(3, target.vocab_size, (1, size), generator=generator).to(DEVICE) for size in lengths]
    sampling = {"do_sample": True, "seed": 3, "temperature": 0.8}
    attempt("equal to plain, greedy", partial(equal_texts, target, prompts, {}))
    attempt("equal to plain, sampled", partial(equal_texts, target, prompts, sampling))
    return {"promise": target.bitwise.describe()}


main()
