"""Sampling parameters of every sequence of a batch, against transformers' logits warpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from medhead import MedheadError
from medhead.config import SamplingParams, check_tree_size
from medhead.core.gumbel import GumbelNoise
from medhead.core.sampling import SamplingBatch, take_warpers

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 3, 17, 500]),
    top_p=st.sampled_from([None, 0.05, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([None, 0.0, 0.02, 0.4]),
    seed=st.integers(0, 2**64 - 1),
)


def warpers(params: SamplingParams) -> LogitsProcessorList:
    """transformers' warpers for these parameters, in transformers' order."""
    found = LogitsProcessorList()
    if params.greedy:
        return found
    if params.temperature != 1:
        found.append(lp.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        found.append(lp.TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        found.append(lp.TopPLogitsWarper(params.top_p))
    if params.min_p:
        found.append(lp.MinPLogitsWarper(params.min_p))
    return found


def batch_of(params: list[SamplingParams], processors: LogitsProcessorList | None = None) -> SamplingBatch:
    return SamplingBatch.of(params, range(len(params)), processors or LogitsProcessorList(), "cpu")


@given(st.lists(PARAMS, min_size=1, max_size=4), st.integers(1, 3), st.booleans(), st.integers(0, 10_000))
def test_a_mixed_batch_is_processed_as_transformers_does(
    params: list[SamplingParams], nodes: int, fixed: bool, seed: int
) -> None:
    """Bit for bit, also in the storage of a captured step that has a place to spare."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(len(params), nodes, 41, generator=generator)
    batch, given_logits = batch_of(params), logits
    if fixed:
        stored = batch.fixed(len(params) + 1)
        stored.load(batch)
        batch, given_logits = stored, torch.cat([logits, logits[:1]])
    found = batch.process(given_logits)
    for row, one in enumerate(params):
        expected = warpers(one)(torch.zeros(nodes, 1, dtype=torch.long), logits[row].clone())
        if one.greedy:  # may pass through the filters of others, but keeps its most probable token
            assert torch.equal(found[row].argmax(-1), expected.argmax(-1))
        else:
            assert torch.equal(found[row], expected)


@given(st.lists(PARAMS, min_size=1, max_size=4), st.booleans())
def test_noise_of_a_mixed_batch(params: list[SamplingParams], fixed: bool) -> None:
    """Every sequence has the noise of its own seed and positions, a greedy one has none."""
    batch, generator = batch_of(params), GumbelNoise(13)
    lengths = torch.arange(len(params)) * 5 + 3
    noise = batch.noise(generator, lengths, 4, fixed)
    if all(one.greedy for one in params):
        assert noise is None
        return
    assert noise is not None
    for row, one in enumerate(params):
        alone = batch_of([one])
        alone.numbers[:, 2] = row
        expected = alone.noise(generator, lengths[row : row + 1], 4, False)
        made = noise.prefix(4)[row]
        assert torch.equal(made, torch.zeros(4, 13) if expected is None else expected.prefix(4)[0])


@given(PARAMS.filter(lambda params: not params.greedy))
def test_warpers_become_parameters(params: SamplingParams) -> None:
    more = lp.TypicalLogitsWarper(0.9)
    found, left = take_warpers(
        LogitsProcessorList([*warpers(params), more]), SamplingParams(7, temperature=1.0, seed=3)
    )
    assert list(left) == [more]
    assert (found.max_new_tokens, found.seed) == (7, 3)
    assert [type(one) for one in warpers(found)] == [type(one) for one in warpers(params)]
    assert (found.temperature, found.top_k) == (params.temperature, params.top_k)


@pytest.mark.parametrize(
    "processor",
    [
        lp.TopKLogitsWarper(5, min_tokens_to_keep=2),
        lp.TopPLogitsWarper(0.5, filter_value=-1e4),
        lp.TemperatureLogitsWarper(1000.0),
        lp.SuppressTokensLogitsProcessor([3]),
    ],
)
def test_what_parameters_cannot_express_stays_a_processor(processor: Any) -> None:
    """Also everything behind it: the order is kept."""
    given_list = LogitsProcessorList([processor, lp.TemperatureLogitsWarper(0.5)])
    found, left = take_warpers(given_list, SamplingParams(temperature=1.0))
    assert list(left) == list(given_list)
    logits = torch.randn(1, 2, 29)
    expected = given_list(torch.zeros(2, 1, dtype=torch.long), logits[0].clone())
    assert torch.equal(batch_of([found], left).process(logits)[0], expected)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"temperature": 100.5}, "temperature must be from 0 to 100, got 100.5"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_k": 2.0}, "top_k must be a whole number of at least 0, got 2.0"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, got -0.1"),
        ({"seed": 2**64}, r"seed must be a whole number from 0 to 2\*\*64 - 1"),
        ({"stop": "end"}, "stop must be a tuple of strings, got 'end'"),
    ],
)
def test_parameters_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MedheadError, match=words) as caught:
        SamplingParams(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 257, 2.0, True, "16"])
def test_tree_sizes_out_of_range(size: Any) -> None:
    with pytest.raises(MedheadError, match="tree_size must be a whole number from 1 to 256"):
        check_tree_size(size)
