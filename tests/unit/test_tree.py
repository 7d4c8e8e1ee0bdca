from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medhead.core.tree import TokenTree
from medhead.errors import MedheadError


@st.composite
def parent_lists(draw: st.DrawFn, most: int = 80) -> list[int]:
    nodes = draw(st.integers(1, most))
    return [0] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]


def brute_force_mask(parents: list[int]) -> list[list[bool]]:
    mask = [[False] * len(parents) for _ in parents]
    for node in range(len(parents)):
        at = node
        while True:
            mask[node][at] = True
            if at == 0:
                break
            at = parents[at]
    return mask


@given(parent_lists())
def test_structure_matches_brute_force(parents: list[int]) -> None:
    tree = TokenTree.from_parents(torch.arange(len(parents)), torch.tensor(parents))
    mask = brute_force_mask(parents)
    assert tree.visible[0].tolist() == mask
    assert tree.depth[0].tolist() == [sum(row) - 1 for row in mask]
    assert tree.max_depth == max(sum(row) - 1 for row in mask)
    words = tree.ancestor_bitmask[0]
    assert words.shape == (len(parents), -(-len(parents) // 64))
    for node, row in enumerate(mask):
        for other, seen in enumerate(row):
            bit = (int(words[node, other // 64]) >> (other % 64)) & 1
            assert bool(bit) == seen


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=8))
def test_from_paths_holds_exactly_the_prefixes(paths: list[list[int]]) -> None:
    tree = TokenTree.from_paths(9, paths)
    prefixes = {tuple(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    assert tree.nodes == 1 + len(prefixes)
    leaves = {p for p in prefixes if not any(q[:-1] == p for q in prefixes)}
    assert {tuple(path) for path in tree.paths(0)} == leaves
    assert int(tree.tokens[0, 0]) == 9


def test_chain_is_the_path_of_its_tokens() -> None:
    tree = TokenTree.chain(torch.tensor([[4, 5, 6], [7, 8, 9]]))
    assert tree.paths(0) == [[5, 6]]
    assert tree.paths(1) == [[8, 9]]
    assert tree.depth.tolist() == [[0, 1, 2]] * 2
    assert TokenTree.root(torch.tensor([3])).nodes == 1


def test_from_ranks_is_medusas_static_tree() -> None:
    candidates = torch.tensor([[10, 11, 12], [20, 21, 22]])
    tree = TokenTree.from_ranks(1, [[1], [0, 1], [0], [0, 0]], candidates)
    assert tree.tokens[0].tolist() == [1, 10, 11, 20, 21]
    assert tree.parents[0].tolist() == [0, 0, 0, 1, 1]


def test_merge_joins_equal_beginnings() -> None:
    one, two = TokenTree.from_paths(1, [[2, 3], [4]]), TokenTree.from_paths(1, [[2, 5], [4, 6]])
    merged = TokenTree.merge([one, two])
    assert {tuple(p) for p in merged.paths(0)} == {(2, 3), (2, 5), (4, 6)}
    assert merged.nodes == 6


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TokenTree.from_parents(torch.tensor([1, 2]), torch.tensor([0, 1])), "before its child"),
        (lambda: TokenTree.from_parents(torch.tensor([1, 2]), torch.tensor([1, 0])), "root is its own parent"),
        (lambda: TokenTree.from_parents(torch.tensor([1, 2]), torch.tensor([0, -1])), "parent -1"),
        (lambda: TokenTree.from_parents(torch.tensor([1, -2]), torch.tensor([0, 0])), "negative"),
        (lambda: TokenTree.from_parents(torch.tensor([1, 2]), torch.tensor([0])), "one shape"),
        (lambda: TokenTree.from_parents(torch.zeros(1, 0), torch.zeros(1, 0)), "at least its root"),
        (lambda: TokenTree.from_ranks(1, [[0, 0]], torch.zeros(2, 2)), "beginning"),
        (lambda: TokenTree.from_ranks(1, [[0], [0, 0]], torch.zeros(1, 2)), "2 deep"),
        (lambda: TokenTree.from_ranks(1, [[5]], torch.zeros(1, 2)), "rank 5"),
        (lambda: TokenTree.from_ranks(1, [[]], torch.zeros(1, 2)), "at least one rank"),
        (lambda: TokenTree.merge([]), "at least one tree"),
        (lambda: TokenTree.merge([TokenTree.from_paths(1, [[2]]), TokenTree.from_paths(3, [[2]])]), "roots"),
    ],
)
def test_invalid_trees_are_refused_with_the_reason(make: object, reason: str) -> None:
    with pytest.raises(MedheadError, match=reason):
        make()  # type: ignore[operator]
