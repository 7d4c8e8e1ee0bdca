from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_llama
from medhead import Decoder
from medhead.core.gumbel import GumbelNoise, LazyGumbel, chunk_size, halves


def chi_square_limit(freedom: int) -> float:
    """Where a chi-square variable lies with probability 1 - 1e-5 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


def test_noise_depends_on_seed_row_and_position_alone() -> None:
    noise = GumbelNoise(7, 50)
    together = noise.gumbel(torch.tensor([[0], [3]]), torch.tensor([[5, 6], [5, 9]]))
    alone = GumbelNoise(7, 50).gumbel(torch.tensor([3]), torch.tensor([9]))
    assert torch.equal(together[1, 1], alone[0])
    others = [GumbelNoise(8, 50), GumbelNoise(7 + 2**32, 50)]
    assert all(not torch.equal(o.gumbel(torch.tensor([3]), torch.tensor([9])), alone) for o in others)
    assert not torch.equal(together[0, 0], together[1, 0])
    assert not torch.equal(together[0, 0], together[0, 1])


@given(st.integers(-(2**70), 2**70), st.integers(0, 2**33), st.integers(1, 70))
def test_every_way_makes_the_same_noise(seed: int, position: int, vocab: int) -> None:
    """A text must not depend on what is installed: compiled loop, numpy and tensors agree to the last bit."""
    noise = GumbelNoise(seed, vocab)
    rows, positions = torch.tensor([[0], [5]]), position + torch.arange(3)
    found = noise.uniform(rows, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medhead.core.gumbel.has_numba", lambda: False)
        assert torch.equal(noise.uniform(rows, positions), found)
    noise._here = None
    assert torch.equal(noise.uniform(rows, positions), found)


def test_uniforms_are_uniform_and_open() -> None:
    values = GumbelNoise(1, 4096).uniform(torch.zeros(1, dtype=torch.long), torch.arange(64)).flatten()
    assert float(values.min()) > 0.0
    assert float(values.max()) < 1.0
    assert torch.isfinite(GumbelNoise(1, 4096).gumbel(torch.tensor([0]), torch.arange(64))).all()
    bins = 256
    counts = torch.histc(values, bins, 0, 1)
    expected = len(values) / bins
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(bins - 1)


def test_neighbours_are_not_correlated() -> None:
    rows, positions = torch.arange(40)[:, None], torch.arange(40)
    values = GumbelNoise(3, 256).uniform(rows, positions.expand(40, 40)) - 0.5  # [rows, positions, vocab]
    scale = float(values.var())
    for shifted in (values[1:] * values[:-1], values[:, 1:] * values[:, :-1], values[..., 1:] * values[..., :-1]):
        assert abs(float(shifted.mean())) / scale < 6 / math.sqrt(shifted.numel())
    other = GumbelNoise(4, 256).uniform(rows, positions.expand(40, 40)) - 0.5
    assert abs(float((values * other).mean())) / scale < 6 / math.sqrt(values.numel())


def test_seeded_sampling_follows_the_softmax() -> None:
    """First and second token of many seeds against the target's own distribution."""
    model = tiny_llama(seed=3, vocab=12, eos_token_id=None)
    draws, temperature, batch = 6000, 1.3, 500
    prompt = torch.tensor([[4, 7, 5]])
    decoder = Decoder(model, "none")
    arguments = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 2, "pad_token_id": 0}
    rows = [decoder.generate(prompt.repeat(batch, 1), seed=seed, **arguments)[:, 3:] for seed in range(draws // batch)]
    drawn = torch.cat(rows)
    with torch.no_grad():
        first = (model(prompt).logits[0, -1] / temperature).softmax(-1)
        joint = torch.zeros(12, 12)
        for token in range(12):
            after = model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, -1]
            joint[token] = first[token] * (after / temperature).softmax(-1)
    counts = torch.zeros(12, 12)
    for one, two in drawn.tolist():
        counts[one, two] += 1
    expected = joint * draws
    common = expected >= 5  # cells that are too rare for the test go into one
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    keep = wanted > 1e-6
    statistic = float(((observed - wanted) ** 2 / wanted)[keep].sum())
    assert statistic < chi_square_limit(int(keep.sum()) - 1)
    assert int(common.sum()) > 10


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 12))
def test_coming_noise_is_the_same_however_it_is_looked_at(looks: list[tuple[bool, int]], piece: int) -> None:
    """In whatever pieces and order; piece by piece, no deeper than somebody looked."""
    noise, made = GumbelNoise(3, 11), []

    def make(begin: int, end: int) -> torch.Tensor:
        made.extend(range(begin, end))
        return noise.gumbel(torch.tensor([[0], [1]]), torch.tensor([[20], [7]]) + torch.arange(begin, end))

    expected = make(0, 9)
    made.clear()
    coming = LazyGumbel(make, 9, piece)
    for whole, depths in looks:
        if whole:
            assert torch.equal(coming.prefix(depths), expected[:, :depths])
        else:
            assert torch.equal(coming.at(depths - 1), expected[:, depths - 1])
    deepest = max(depths for _, depths in looks)
    assert made == list(range(min(9, -(-deepest // piece) * piece)))


@given(
    st.integers(-(2**63), 2**63),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=3),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=4),
)
def test_a_cpu_makes_the_same_numbers_in_its_own_way(seed: int, rows: list[int], positions: list[int]) -> None:
    """numpy's uint32 against the tensors that every other device, and a step that is written down, computes with."""
    noise = GumbelNoise(seed, 37)
    where = torch.tensor(rows)[:, None], torch.tensor(positions)[None] + torch.tensor(rows)[:, None]
    elsewhere = noise.seeded_by(torch.tensor(halves(seed)))
    assert torch.equal(noise.uniform(*where), elsewhere.uniform(*where))


def test_noise_is_cut_into_pieces_on_a_cpu_alone() -> None:
    assert chunk_size(1, 1024, torch.device("cpu")) == 16
    assert chunk_size(64, 2**17, torch.device("cpu")) == 1
    assert chunk_size(64, 2**17, torch.device("cuda")) > 256
