"""Rows that join and leave a running batch, in every family: each gets the text that plain decoding gives it alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.core.loop import DecodeLoop
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead.model.target import Target
from medhead.proposers import build_proposer


def sequence(prompt: list[int], limit: int, temperature: float, seed: int) -> Sequence:
    params = SamplingParams(limit, temperature=temperature, seed=seed)
    return Sequence(list(prompt), list(prompt), StopChecker(limit), params)


def alone(target: Target, prompt: list[int], limit: int, temperature: float, seed: int) -> list[int]:
    decoder = Decoder(target, "none")
    target.model.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "temperature": temperature, "seed": seed, "top_k": 0} if temperature else {}
    out = decoder.generate(torch.tensor([prompt]), max_new_tokens=limit, **({"do_sample": False} | sampling))
    return out[0, len(prompt) :].tolist()


def decode(target: Target, proposer: str, jobs: list[tuple], arrivals: list[int]) -> list[list[int]]:
    """All jobs (prompt, limit, temperature, seed) in one batch, each joining at its step."""
    loop = DecodeLoop(target, build_proposer(proposer, target, tree_size=8))
    sequences = [sequence(*job) for job in jobs]
    with torch.inference_mode(), target.active(loop.proposer.feature_layers):
        step, waiting = 0, sorted(range(len(jobs)), key=lambda index: arrivals[index])
        while waiting or loop.sequences:
            joining = [index for index in waiting if arrivals[index] <= step]
            if joining:
                loop.join([sequences[index] for index in joining])
                waiting = [index for index in waiting if index not in joining]
            if loop.sequences:
                loop.step()
            step += 1
    return [one.output_ids for one in sequences]


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_rows_join_in_every_family(name: str) -> None:
    if not exists(name):
        pytest.skip(f"this version of transformers has no {name}")
    target = Target(tiny(name, ACCEPTED[name]), probe=False)
    random = torch.Generator().manual_seed(4)
    jobs = [
        (torch.randint(3, 99, (length,), generator=random).tolist(), limit, temperature, seed)
        for length, limit, temperature, seed in ((5, 14, 0.0, 0), (12, 9, 0.8, 7), (3, 11, 1.0, 7), (7, 12, 0.0, 0))
    ]
    found = decode(target, "recycling", jobs, [0, 2, 2, 5])
    assert found == [alone(target, *job) for job in jobs]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from([0.0, 0.7, 1.0]), st.integers(0, 12)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["ngram", "recycling", "lookahead", "none", "hybrid"]),
)
def test_any_arrivals(jobs: list[tuple[int, int, float, int]], proposer: str) -> None:
    target = Target(tiny_llama(), probe=False)
    random = torch.Generator().manual_seed(len(jobs))
    made = [
        (torch.randint(3, 64, (length,), generator=random).tolist(), limit, temperature, number)
        for number, (length, limit, temperature, _) in enumerate(jobs)
    ]
    found = decode(target, proposer, made, [arrival for *_, arrival in jobs])
    assert found == [alone(target, *job) for job in made]
