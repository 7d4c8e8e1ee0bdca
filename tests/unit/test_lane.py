"""Rows that join and leave a running batch, in every family: each gets the text that plain decoding gives it alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp

from conftest import tiny_llama
from families import ACCEPTED, exists, tiny
from medhead import Decoder
from medhead.core.gumbel import GumbelNoise
from medhead.core.sequence import Sequence, Settings
from medhead.core.stopping import StopChecker
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.serving.decode_batch import DecodeBatch


def own(target: Target, limit: int, temperature: float, seed: int) -> Settings:
    processors = LogitsProcessorList()
    if temperature:
        processors.append(lp.TemperatureLogitsWarper(temperature))
    noise = GumbelNoise(seed, target.vocab_size, target.device) if temperature else None
    return Settings(processors, StopChecker(StoppingCriteriaList(), limit, target.device), noise=noise)


def alone(target: Target, prompt: list[int], limit: int, temperature: float, seed: int) -> list[int]:
    decoder = Decoder(target, "none")
    target.model.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "temperature": temperature, "seed": seed, "top_k": 0} if temperature else {}
    out = decoder.generate(torch.tensor([prompt]), max_new_tokens=limit, **({"do_sample": False} | sampling))
    return out[0, len(prompt) :].tolist()


def decode(target: Target, proposer: str, jobs: list[tuple], arrivals: list[int]) -> list[list[int]]:
    """All jobs (prompt, limit, temperature, seed) in one lane, each joining at its step."""
    lane = DecodeBatch(target, build_proposer(proposer, target, tree_size=8))
    rows = [Sequence(0, list(job[0]), list(job[0]), own=own(target, *job[1:])) for job in jobs]
    with torch.inference_mode(), target.active(lane.proposer.feature_layers):
        step, waiting = 0, sorted(range(len(jobs)), key=lambda index: arrivals[index])
        while waiting or lane.rows:
            joining = [index for index in waiting if arrivals[index] <= step]
            if joining:
                lane.join([rows[index] for index in joining])
                waiting = [index for index in waiting if index not in joining]
            if lane.rows:
                lane.step()
            step += 1
    return [row.output for row in rows]


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


def test_an_empty_lane_holds_no_cache() -> None:
    target = Target(tiny_llama(), probe=False)
    lane = DecodeBatch(target, build_proposer("none", target))
    with torch.inference_mode(), target.active():
        lane.join([Sequence(0, [5, 6], [5, 6], own=own(target, 1, 0.0, 0))])
        lane.step()
    assert not lane.rows
    assert not hasattr(lane, "cache")
