"""Who takes part: our proposers and what a user of transformers would otherwise run, on one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medhead.decoder import Decoder, Statistics
from medhead.heads import load_heads
from medhead.model.target import Target

PROPOSERS_SHOWN = ("ngram", "lookahead", "recycling", "hybrid")
TRANSFORMERS, LOOKUP, PLAIN = "transformers generate", "transformers prompt lookup", "medhead plain"


@dataclass
class Contestant:
    """One way to decode.

    Attributes:
        name: as in the table.
        dtype: name of the model's type.
        run: prompt ids `[1, tokens]` to prompt and output ids `[1, more]`.
        statistics: of the last run; None for what is not ours.
        nodes: nodes of the tree, 0 for what is not ours.
    """

    name: str
    dtype: str
    run: Callable[[Tensor], Tensor]
    statistics: Callable[[], Statistics | None]
    nodes: int = 0


@dataclass(frozen=True)
class Lineup:
    """What is measured.

    Attributes:
        new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        seed: of the sampling.
        heads: heads folders; the first one is `medhead heads`, others are named after their kind.
        proposers: names of further proposers; `hybrid` gets the first heads.
        tree_sizes: further trees of the first heads.
        tree_size: tree of all proposers; each one's own default if None.
        steps: ways to run a captured step (`medhead.compile`), each for plain decoding and for the first heads.
    """

    new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    heads: tuple[str | Path, ...] = ()
    proposers: tuple[str, ...] = PROPOSERS_SHOWN
    tree_sizes: tuple[int, ...] = ()
    tree_size: int | None = None
    steps: tuple[str, ...] = ()


def contestants(model: PreTrainedModel, lineup: Lineup) -> list[Contestant]:
    """All contestants on one model; the first three are the ones to beat."""
    dtype = str(model.dtype).removeprefix("torch.")
    sampling: dict[str, Any] = {"max_new_tokens": lineup.new_tokens, "do_sample": lineup.temperature > 0}
    if lineup.temperature > 0:
        sampling |= {"temperature": lineup.temperature, "top_k": 0, "top_p": 1.0}

    def peer(name: str, **more: Any) -> Contestant:
        def run(ids: Tensor) -> Tensor:
            torch.manual_seed(lineup.seed)
            return model.generate(ids, attention_mask=torch.ones_like(ids), **sampling, **more)

        return Contestant(name, dtype, run, lambda: None)

    target = Target(model)

    def ours(name: str, proposer: str, **options: Any) -> Contestant:
        decoder = Decoder(target, proposer, **options)

        def run(ids: Tensor) -> Tensor:
            return decoder.generate(ids, attention_mask=torch.ones_like(ids), seed=lineup.seed, **sampling)

        return Contestant(name, dtype, run, lambda: decoder.statistics, decoder.proposer.tree_size)

    found = [peer(TRANSFORMERS), peer(LOOKUP, prompt_lookup_num_tokens=10), ours(PLAIN, "none")]
    for name in lineup.proposers:
        with_heads = {"heads": lineup.heads[0]} if name == "hybrid" and lineup.heads else {}
        found.append(ours(f"medhead {name}", name, tree_size=lineup.tree_size, **with_heads))
    for place, folder in enumerate(lineup.heads):
        heads = load_heads(folder, target)
        name = f"medhead heads ({heads.config.label})" if place else "medhead heads"
        found.append(ours(name, "heads", heads=heads, tree_size=lineup.tree_size))
        if lineup.temperature > 0:
            blind = {"heads": folder, "tree_size": lineup.tree_size, "rank_by_noise": False}
            found.append(ours(f"{name}, blind to the noise", "heads", **blind))
    if lineup.steps and target.device.type == "cuda":  # on a CPU generate does not compile
        found.append(peer(f"{TRANSFORMERS}, static cache", cache_implementation="static"))
    for step in lineup.steps:
        found.append(ours(f"{PLAIN}, {step}", "none", step=step))
        first_heads: dict[str, Any] = {"heads": lineup.heads[0]} if lineup.heads else {}
        if lineup.heads:
            found.append(ours(f"medhead heads, {step}", "heads", tree_size=lineup.tree_size, step=step, **first_heads))
        if step == "compiled" and "hybrid" in lineup.proposers:  # in pieces: its members work on the host
            found.append(
                ours(f"medhead hybrid, {step}", "hybrid", tree_size=lineup.tree_size, step=step, **first_heads)
            )
    for size in lineup.tree_sizes:
        found.append(ours(f"medhead heads, {size} nodes", "heads", heads=lineup.heads[0], tree_size=size))
    return found
