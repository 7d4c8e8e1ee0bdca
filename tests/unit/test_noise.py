from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_llama
from medhead import Decoder
from medhead.core.gumbel import GumbelNoise, LazyGumbel, chunk_size, seed_halves


def chi_square_limit(freedom: int) -> float:
    """Where a chi-square variable lies with probability 1 - 1e-5 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


def seeds(*numbers: int) -> torch.Tensor:
    return torch.tensor([seed_halves(number) for number in numbers])


def test_noise_depends_on_seed_row_and_position_alone() -> None:
    noise = GumbelNoise(50)
    together = noise.gumbel(seeds(7, 7), torch.tensor([0, 3]), torch.tensor([[5, 6], [5, 9]]))
    row, position = torch.tensor([3]), torch.tensor([[9]])
    alone = noise.gumbel(seeds(7), row, position)[0]
    assert torch.equal(together[1, 1], alone[0])
    for other in (8, 7 + 2**32):
        assert not torch.equal(noise.gumbel(seeds(other), row, position)[0], alone)
    assert not torch.equal(together[0, 0], together[1, 0])
    assert not torch.equal(together[0, 0], together[0, 1])


@given(
    st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=3),
    st.integers(0, 2**33),
    st.lists(st.integers(0, 2**20), min_size=1, max_size=4),
    st.integers(1, 70),
)
def test_tensors_make_the_same_noise_as_numpy(numbers: list[int], row: int, positions: list[int], vocab: int) -> None:
    """numpy's uint32 on a CPU against the int64 tensors of every other device and of a traced step, to the last bit."""
    noise, rows = GumbelNoise(vocab), row + torch.arange(len(numbers))
    where = torch.tensor(positions) + torch.arange(len(numbers))[:, None]
    found = noise.uniform(seeds(*numbers), rows, where)
    traced = where.as_subclass(torch.nn.Buffer)  # any other type than a plain tensor takes the other way
    assert type(traced) is not torch.Tensor
    assert torch.equal(noise.uniform(seeds(*numbers), rows, traced).as_subclass(torch.Tensor), found)


def test_uniforms_are_uniform_and_open() -> None:
    noise, row, positions = GumbelNoise(4096), torch.tensor([0]), torch.arange(64)[None]
    values = noise.uniform(seeds(1), row, positions).flatten()
    assert float(values.min()) > 0.0
    assert float(values.max()) < 1.0
    assert torch.isfinite(noise.gumbel(seeds(1), row, positions)).all()
    bins = 256
    counts = torch.histc(values, bins, 0, 1)
    expected = len(values) / bins
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(bins - 1)


def test_neighbours_are_not_correlated() -> None:
    rows, positions = torch.arange(40), torch.arange(40).expand(40, 40)
    values = GumbelNoise(256).uniform(seeds(*[3] * 40), rows, positions) - 0.5  # [rows, positions, vocab]
    scale = float(values.var())
    for shifted in (values[1:] * values[:-1], values[:, 1:] * values[:, :-1], values[..., 1:] * values[..., :-1]):
        assert abs(float(shifted.mean())) / scale < 6 / math.sqrt(shifted.numel())
    other = GumbelNoise(256).uniform(seeds(*[4] * 40), rows, positions) - 0.5
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
    noise, made = GumbelNoise(11), []

    def make(begin: int, end: int) -> torch.Tensor:
        made.extend(range(begin, end))
        where = torch.tensor([[20], [7]]) + torch.arange(begin, end)
        return noise.gumbel(seeds(3, 3), torch.tensor([0, 1]), where)

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


def test_noise_is_cut_into_pieces_on_a_cpu_alone() -> None:
    assert chunk_size(1, 1024, torch.device("cpu")) == 16
    assert chunk_size(64, 2**17, torch.device("cpu")) == 1
    assert chunk_size(64, 2**17, torch.device("cuda")) > 256
