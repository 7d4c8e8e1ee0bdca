"""Candidates of several proposers, against dictionaries of paths."""

from __future__ import annotations

import itertools
import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medhead.core.tree import TokenTree
from medhead.proposers.candidates import Candidates, candidates_from_tries, merge
from medhead.proposers.trie import DraftTrie

Paths = list[tuple[list[int], list[float]]]


def random_paths(source: random.Random, count: int, depth: int) -> Paths:
    """Paths over three tokens with falling log-probabilities; all ties are broken."""
    paths = []
    for _ in range(count):
        tokens = [source.randrange(3) for _ in range(source.randint(1, depth))]
        steps, total = [], 0.0
        for _ in tokens:
            total -= source.uniform(0.01, 2.0)
            steps.append(total)
        paths.append((tokens, steps))
    return paths


def candidates_from_paths(rows: list[Paths]) -> Candidates | None:
    """Paths of every row as candidates."""
    made = []
    for paths in rows:
        trie = DraftTrie(9)
        for tokens, scores in paths:
            node = 0
            for token, score in zip(tokens, scores, strict=True):
                node = trie.add(node, token, math.exp(score))
        made.append(trie)
    return candidates_from_tries(made)


def by_path(paths: Paths) -> dict[tuple[int, ...], float]:
    """The best score of every beginning of a path."""
    found: dict[tuple[int, ...], float] = {}
    for tokens, scores in paths:
        for length, score in enumerate(scores, 1):
            key = tuple(tokens[:length])
            found[key] = max(score, found.get(key, -math.inf))
    return found


def nodes_of(tree: TokenTree, row: int) -> set[tuple[int, ...]]:
    """Paths of all nodes of a tree but the root."""
    TokenTree.from_parents(tree.tokens, tree.parents)  # raises when invalid
    return {tuple(path[:n]) for path in tree.paths(row) for n in range(1, len(path) + 1)}


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 3), st.integers(1, 3))
def test_the_best_of_all_members(seed: int, nodes: int, members: int, batch: int) -> None:
    """Equal paths are one node with the best score; the likeliest nodes are the tree, in every row."""
    source = random.Random(seed)
    given_paths = [[random_paths(source, source.randint(0, 4), 4) for _ in range(batch)] for _ in range(members)]
    made = [found for rows in given_paths if (found := candidates_from_paths(rows)) is not None]
    if not made:
        return
    merged = merge(made)
    roots = torch.arange(batch)
    tree = merged.best_tree(roots, nodes)
    gains = merged.top_probs(nodes - 1)
    for row in range(batch):
        scores = by_path([path for rows in given_paths for path in rows[row]])
        ranked = sorted(scores, key=lambda path: 1e-4 * len(path) - scores[path])
        expected = set(ranked[: nodes - 1])
        found = nodes_of(tree, row)
        if expected:
            assert found == expected
        best = sorted(scores.values(), reverse=True)[: nodes - 1]
        torch.testing.assert_close(gains[row, : len(best)], torch.tensor(best).exp(), rtol=1e-4, atol=1e-6)
        assert not bool(gains[row, len(best) :].any())


def test_a_hash_tells_paths_apart() -> None:
    """Every path over eight tokens and four levels has a key of its own."""
    levels = tuple(8**depth for depth in range(1, 5))
    parent_index = torch.cat(
        [torch.full((8,), -1)] + [torch.arange(8**d).repeat_interleave(8) + sum(levels[: d - 1]) for d in range(1, 4)]
    )[None]
    tokens = torch.arange(8).repeat(sum(levels) // 8)[None]
    keys = Candidates(tokens, parent_index, torch.zeros(1, sum(levels)), levels).keys()
    assert len(set(keys[0].tolist())) == sum(levels)


def test_nothing_found() -> None:
    """No paths at all, and a row without any beside one that has some."""
    assert candidates_from_paths([[], []]) is None
    found = candidates_from_paths([[], [([5, 6], [-0.1, -0.2])]])
    assert found is not None
    tree = found.best_tree(torch.tensor([1, 2]), 3)
    assert nodes_of(tree, 1) == {(5,), (5, 6)}
    assert found.top_probs(2)[0].tolist() == [0, 0]
    assert found.best_tree(torch.tensor([1, 2]), 1).nodes == 1


def test_probabilities_conditioned_on_noise() -> None:
    """A token is drawn as often as the noise at its place promises; a path is as likely as its tokens together."""
    torch.manual_seed(0)
    share = torch.tensor([0.6, 0.3, 0.08, 0.02])
    draws, depths = 4000, 3
    noise = -(-torch.rand(draws, depths, 4, dtype=torch.float64).log()).log()
    drawn = (share.log() + noise).argmax(-1)
    paths: Paths = [([0, 1, 0], [0.0] * 3), ([1, 0], [0.0] * 2), ([2], [0.0])]
    for tokens, scores in paths:
        scores[:] = share[tokens].log().cumsum(0).tolist()
    one = candidates_from_paths([paths])
    assert one is not None
    named = Candidates(*(part.expand(draws, -1) for part in (one.tokens, one.parent_index, one.scores)), one.levels)
    probs = named.condition_on_noise(noise.float()).scores.exp()
    right: list[torch.Tensor] = []
    for place, (token, parent_index) in enumerate(
        zip(one.tokens[0].tolist(), one.parent_index[0].tolist(), strict=True)
    ):
        depth = next(d for d in range(depths) if place < sum(one.levels[: d + 1]))
        hit = drawn[:, depth] == token
        right.append(hit if parent_index < 0 else right[parent_index] & hit)
    assert len(right) == 6
    for place, hits in enumerate(right):
        promised = probs[:, place]
        assert torch.allclose(promised.mean(), hits.double().mean().float(), atol=0.02)
        for low, high in ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0)):
            among = (promised >= low) & (promised <= high)
            if among.sum() > 200:
                assert abs(float(promised[among].mean() - hits[among].float().mean())) < 0.06
    assert float(probs[:, 0].std()) > 0.2  # the noise does tell


def test_rows_without_candidates_stay_without() -> None:
    """What only fills a row up is not brought to life by noise."""
    named = candidates_from_paths([[([1, 2], [-0.5, -0.7])], []])
    assert named is not None
    seen = named.condition_on_noise(torch.full((2, 2, 4), 9.0))
    assert bool((seen.scores[1] == -torch.inf).all())
    assert bool((seen.scores[0] > -0.01).all())
    assert nodes_of(seen.best_tree(torch.tensor([0, 0]), 3), 0) == {(1,), (1, 2)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.lists(st.floats(0.2, 6.0), min_size=4, max_size=4))
def test_corrected_candidates_still_make_trees(seed: int, nodes: int, ratios: list[float]) -> None:
    """Whatever the corrections, every node of the tree stands below its own parent: all paths are among the candidates."""
    random = torch.Generator().manual_seed(seed)
    levels, parent_index, scores = (3, 4, 4, 3), [], []
    begin = 0
    for depth, size in enumerate(levels):
        for _ in range(size):
            parent = (
                -1
                if depth == 0
                else begin - levels[depth - 1] + int(torch.randint(levels[depth - 1], (), generator=random))
            )
            parent_index.append(parent)
            scores.append((0.0 if parent < 0 else scores[parent]) + float(torch.rand((), generator=random).log()) * 0.3)
        begin += size
    tokens = torch.arange(len(parent_index))[None] + 100
    named = Candidates(tokens, torch.tensor([parent_index]), torch.tensor([scores]), levels)
    shifted = named.shift(list(itertools.accumulate(map(math.log, ratios))), -1e-3)
    tree = shifted.best_tree(torch.tensor([7]), nodes)
    assert all(parent < node for node, parent in enumerate(tree.parents[0].tolist()) if node)
    assert set(tree.paths_to(0)[1:]) <= set(named.paths(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_children_as_likely_as_their_parents_never_stand_alone(seed: int, nodes: int) -> None:
    """Heads may be certain: paths of equal scores, however unlikely, enter a tree from above."""
    random = torch.Generator().manual_seed(seed)
    levels = (4, 4, 4, 4)
    order = torch.cat([torch.randperm(4, generator=random) for _ in range(3)]).tolist()
    parent_index = [-1] * 4 + [4 * (place // 4) + parent for place, parent in enumerate(order)]
    scores: list[float] = [-1e4 * float(torch.rand((), generator=random)) - 2e4 for _ in range(4)]
    for parent in parent_index[4:]:
        scores.append(scores[parent])
    named = Candidates(torch.arange(16)[None] + 100, torch.tensor([parent_index]), torch.tensor([scores]), levels)
    tree = named.best_tree(torch.tensor([7]), nodes)
    assert all(parent < node for node, parent in enumerate(tree.parents[0].tolist()) if node)
    assert set(tree.paths_to(0)[1:]) <= set(named.paths(0))


@settings(max_examples=300)  # few of them lie where it matters
@given(st.integers(0, 10**6), st.integers(2, 14), st.booleans(), st.booleans())
def test_best_is_a_tree_whatever_the_scores_are(seed: int, nodes: int, unknown: bool, rises: bool) -> None:
    """Scores of -inf are no nodes of their own, and a child above its parent (by rounding) never stands without it."""
    source = random.Random(seed)
    levels = tuple(source.randint(1, 4) for _ in range(source.randint(1, 5)))
    parent_index, scores, begin = [], [], 0
    for depth, size in enumerate(levels):
        for _ in range(size):
            parent = source.randrange(begin - levels[depth - 1], begin) if depth else -1
            step = source.choice([0.0, 0.0, 0.0, -2.0])
            score = (scores[parent] if depth else 0.0) + step + (1e-6 if rises and depth and not step else 0.0)
            parent_index.append(parent)
            scores.append(-math.inf if unknown and source.random() < 0.3 else score)
        begin += size
    tokens = torch.tensor([[source.randrange(9) for _ in parent_index]])
    found = Candidates(tokens, torch.tensor([parent_index]), torch.tensor([scores]), levels)
    found = found.make_monotone() if unknown else found  # below what is unknown all is
    tree = found.best_tree(torch.tensor([3]), nodes)
    assert torch.equal(TokenTree.from_parents(tree.tokens, tree.parents).depth, tree.depth)
    assert tree.nodes <= nodes
    known = int((found.scores > -math.inf).sum())
    assert tree.nodes >= min(nodes, 1 + known)


def test_the_host_counts_possible_candidates_only_where_it_need_not_wait() -> None:
    scores = torch.tensor([[0.0, -1.0, -math.inf], [-0.5, -math.inf, -math.inf]])
    found = Candidates(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1), scores, (3,))
    assert found.num_possible() == 2
    elsewhere = Candidates(found.tokens.to("meta"), found.parent_index.to("meta"), scores.to("meta"), (3,))
    assert elsewhere.num_possible() == 3  # a tensor of this device cannot be read
