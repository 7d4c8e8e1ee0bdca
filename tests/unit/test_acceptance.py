from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medhead.core import acceptance
from medhead.core.acceptance import TypicalAcceptance, accept_drawn, verify_typical
from medhead.core.sampling import first_largest
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError


def random_tree(seed: int, batch: int, nodes: int, vocab: int) -> tuple[TokenTree, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    parents = torch.zeros(batch, nodes, dtype=torch.long)
    for node in range(1, nodes):
        parents[:, node] = torch.randint(0, node, (batch,), generator=generator)
    return TokenTree.from_parents(torch.randint(0, vocab, (batch, nodes), generator=generator), parents), generator


@pytest.mark.parametrize("most", [0, 10**6], ids=["tensors", "host"])
@given(seed=st.integers(0, 100_000), batch=st.integers(1, 4), nodes=st.integers(1, 20))
def test_accept_matches_the_walk(most: int, seed: int, batch: int, nodes: int) -> None:
    tree, generator = random_tree(seed, batch, nodes, 3)  # few tokens: siblings repeat and guesses are often right
    drawn = torch.randint(0, 3, (batch, nodes), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "_MAX_HOST_NODES", most)
        found = accept_drawn(tree, drawn)
    for row in range(batch):
        tokens, parents, targets = tree.tokens[row].tolist(), tree.parents[row].tolist(), drawn[row].tolist()
        frontier, depth = [0], 0
        while True:
            below = [n for n in range(1, nodes) if parents[n] in frontier and tokens[n] == targets[parents[n]]]
            if not below:
                break
            frontier, depth = below, depth + 1
        assert int(found.counts[row]) == depth + 1
        assert int(found.last[row]) in frontier
        path = found.path[row, : depth + 1].tolist()
        assert path[0] == 0
        assert path[-1] == int(found.last[row])
        assert all(parents[child] == parent for parent, child in pairwise(path))
        assert found.emitted[row, : depth + 1].tolist() == [targets[node] for node in path]
        assert [tokens[node] for node in path[1:]] == found.emitted[row, :depth].tolist()


@given(st.integers(0, 100_000), st.integers(1, 3), st.integers(1, 12))
def test_typical_acceptance_matches_its_definition(seed: int, batch: int, nodes: int) -> None:
    tree, generator = random_tree(seed, batch, nodes, 6)
    scores = 2 * torch.randn(batch, nodes, 6, generator=generator)
    drawn = scores.argmax(-1)
    rule = TypicalAcceptance(0.2, 0.5)
    found = verify_typical(tree, scores, None, rule)
    p = scores.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    for row in range(batch):
        kept = [True] * nodes
        for node in range(1, nodes):
            parent, token = int(tree.parents[row, node]), int(tree.tokens[row, node])
            threshold = min(0.2, 0.5 * float(torch.exp(-entropy[row, parent])))
            kept[node] = kept[parent] and float(p[row, parent, token]) > threshold
        deepest = max(int(tree.depth[row, n]) for n in range(nodes) if kept[n])
        count = int(found.counts[row])
        assert count == deepest + 1
        path = found.path[row, :count].tolist()
        assert all(kept[node] for node in path)
        emitted = found.emitted[row, :count].tolist()
        assert emitted[:-1] == tree.tokens[row, path[1:]].tolist()
        assert emitted[-1] == int(drawn[row, path[-1]])


def test_typical_thresholds_must_be_probabilities() -> None:
    with pytest.raises(MedheadError, match="epsilon"):
        TypicalAcceptance(0.0, 0.3)


@given(
    st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([None, float("nan"), float("inf"), float("-inf")]), st.booleans(),
)  # fmt: skip
def test_first_largest_is_argmax(seed: int, dtype: torch.dtype, odd: float | None, ties: bool) -> None:
    """Ties as well: which of two equal logits is drawn is part of the text."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, 37, generator=generator, dtype=torch.float64)
    values = (values.round() if ties else values).to(dtype)
    if odd is not None:
        values[torch.rand(values.shape, generator=generator) < 0.1] = odd
    found = first_largest(values)
    assert torch.equal(found, values.argmax(-1))
    assert torch.equal(first_largest(values[0, 0]), values[0, 0].argmax(-1))
    if dtype == torch.float64:  # as float32 these are equal
        assert int(first_largest(torch.tensor([1.0, 1.0 + 1e-12], dtype=dtype))) == 1
