from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.proposers.growth import grow
from medhead.proposers.static_tree import StaticShape, best_static_tree


class TableExpander:
    """Log-probabilities that depend on depth and parent token; three tokens."""

    def __init__(self, table: Tensor, batch: int) -> None:
        self.table, self.batch = table, batch  # [depth, token, child]

    def start(self) -> Tensor:
        return torch.zeros(self.batch, 1, 1)

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        top = self.table[depth][tokens].topk(self.table.shape[2], -1)
        return state.expand(-1, tokens.shape[1], -1), top.values, top.indices


@given(st.integers(0, 10_000), st.integers(2, 14))
def test_grown_tree_is_the_best_one(seed: int, nodes: int) -> None:
    depth, vocab = 3, 3
    generator = torch.Generator().manual_seed(seed)
    table = (2 * torch.randn(depth, vocab, vocab, generator=generator)).log_softmax(-1)
    tree = grow(torch.tensor([1]), TableExpander(table, 1), depth, 27, nodes).best_tree(torch.tensor([1]), nodes)
    scores = {}
    for length in range(1, depth + 1):
        for path in itertools.product(range(vocab), repeat=length):
            before = (1, *path[:-1])
            scores[path] = sum(float(table[d, before[d], path[d]]) - 1e-4 for d in range(length))
    ordered = sorted(scores.values(), reverse=True)
    assume(ordered[nodes - 2] - ordered[nodes - 1] > 1e-5)  # no tie decides, sums are rounded
    best = sorted(scores, key=lambda p: -scores[p])[: nodes - 1]
    grown = {tuple(p[:n]) for p in tree.paths(0) for n in range(1, len(p) + 1)}
    assert grown == set(best)
    assert tree.nodes == nodes


@given(st.integers(0, 10_000), st.integers(2, 20), st.integers(1, 3), st.integers(1, 3))
def test_grown_trees_are_valid(seed: int, nodes: int, width: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 3, 3, generator=generator).log_softmax(-1)
    roots = torch.randint(0, 3, (batch,), generator=generator)
    tree = grow(roots, TableExpander(table, batch), 4, width, nodes).best_tree(roots, nodes)
    checked = TokenTree.from_parents(tree.tokens, tree.parents)  # raises when invalid
    assert torch.equal(checked.depth, tree.depth)
    assert int(tree.depth.max()) <= 4


class Counting(TableExpander):
    """Counts the levels it was asked for."""

    levels = 0

    def expand(self, state: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        self.levels += 1
        return super().expand(state, tokens, depth)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 3), st.integers(1, 2))
def test_growing_ends_when_nothing_deeper_can_matter(seed: int, nodes: int, width: int, batch: int) -> None:
    """The tree is that of all levels; levels are only left out when they cannot change it."""
    generator = torch.Generator().manual_seed(seed)
    table = (3 * torch.randn(6, 3, 3, generator=generator)).log_softmax(-1)
    roots = torch.randint(0, 3, (batch,), generator=generator)
    expander = Counting(table, batch)
    tree = grow(roots, expander, 6, width, nodes).best_tree(roots, nodes)
    whole = grow(roots, TableExpander(table, batch), 6, width).best_tree(roots, nodes)
    for row in range(batch):
        assert sorted(tree.paths(row)) == sorted(whole.paths(row))
    deepest = int(whole.depth.max())
    assert deepest <= expander.levels <= 6
    certain = Counting(torch.tensor([0.98, 0.01, 0.01]).log().expand(6, 3, 3), 1)
    grow(roots[:1], certain, 6, 2, min_prob=math.exp(-0.05))
    assert certain.levels == 3  # 0.98 ** 3 is the first below 0.95


def test_rows_share_what_a_level_costs() -> None:
    """How deep to look is a matter of all rows' chances together: one hopeful row does not make a batch look."""
    table = torch.tensor([[[0.9, 0.05, 0.05], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]]]).log().expand(6, 3, 3)
    alone, batch = Counting(table, 1), Counting(table, 4)
    grow(torch.tensor([0]), alone, 6, 1, min_prob=0.4)
    assert alone.levels == 6  # 0.9 ** 6 is above 0.4
    grow(torch.tensor([0, 1, 1, 1]), batch, 6, 1, min_prob=0.4)
    assert batch.levels == 4  # (0.9 + 3 * 0.4) / 4 = 0.525; 0.9 ** 3 of it is the first below 0.4


def test_a_certain_child_never_displaces_its_parent() -> None:
    table = torch.full((3, 3, 3), -100.0)
    table[:, :, 1] = 0.0  # token 1 follows everything for certain: all log-probabilities on the path are equal
    tree = grow(torch.tensor([0]), TableExpander(table, 1), 3, 3, 3).best_tree(torch.tensor([0]), 3)
    assert tree.paths(0) == [[1, 1]]


@given(st.integers(0, 1000), st.integers(1, 3))
def test_static_shape_fills_like_from_ranks(seed: int, max_depth: int) -> None:
    ranks = [[0], [1], [0, 0], [0, 2], [1, 0], [0, 0, 1], [1, 0, 0]]
    table = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(seed)).log_softmax(-1).expand(3, 3, 3)
    tree = StaticShape(ranks).fill(torch.tensor([2]), TableExpander(table, 1), max_depth)
    candidates = torch.stack([table[d, 0].topk(3).indices for d in range(3)])
    expected = TokenTree.from_ranks(2, [r for r in ranks if len(r) <= max_depth], candidates)
    assert torch.equal(tree.tokens, expected.tokens)
    assert torch.equal(tree.parents, expected.parents)
    assert torch.equal(tree.depth, expected.depth)


@given(st.lists(st.lists(st.floats(0.01, 0.6), min_size=3, max_size=3), min_size=1, max_size=3), st.integers(2, 12))
def test_best_static_tree_maximises_expected_length(rates: list[list[float]], nodes: int) -> None:
    rates = [sorted(row, reverse=True) for row in rates]
    value = {}
    for length in range(1, len(rates) + 1):
        for path in itertools.product(range(3), repeat=length):
            value[path] = torch.tensor([rates[d][r] for d, r in enumerate(path)]).prod().item()
    best = sum(sorted(value.values(), reverse=True)[: nodes - 1])
    found = best_static_tree(rates, nodes)
    assert sum(value[tuple(path)] for path in found) == pytest.approx(best, rel=1e-4)
    StaticShape(found)  # closed under beginnings


def test_static_tree_needs_numbers() -> None:
    with pytest.raises(MedheadError, match="accuracies"):
        best_static_tree([], 4)
