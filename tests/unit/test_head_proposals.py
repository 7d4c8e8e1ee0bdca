"""Proposing with heads: trees node by node, encoded tokens, output matrices, shared heads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import HEADS, noise_heads
from families import ACCEPTED, tiny
from medhead import Decoder, MedheadError
from medhead.core.gumbel import LazyGumbel
from medhead.heads import output_head as output_head_module
from medhead.heads.draft_cache import DraftCacheView
from medhead.heads.output_head import OutputHead
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsProposer


def children_of(
    output_head: OutputHead,
    given: DecodeState,
    memory: DraftCacheView | None,
    row: int,
    path: list[int],
    sharpness: float,
) -> dict[int, float]:
    """Return the four most likely children of a node and their log-probabilities, computed on its path alone."""
    heads = output_head.heads
    codes = [output_head.token(torch.tensor([[token]]), depth) for depth, token in enumerate(path)]
    state, context = heads.init_state(given.features[row : row + 1, None], codes[0], memory)
    for depth, code in enumerate(codes):
        state, feature = heads.step(state, code, depth, context)
    logits = output_head.logits(feature, len(path) - 1)[0, 0]
    names = torch.arange(len(logits)) if output_head.tokens is None else output_head.tokens
    if given.noise is not None:
        logits = logits / given.temperature + given.noise.at(len(path) - 1)[row, names]
    else:
        logits = logits * sharpness
    top = logits.log_softmax(-1).topk(4)
    return dict(zip(names[top.indices].tolist(), top.values.tolist(), strict=True))


def best_paths(
    output_head: OutputHead,
    given: DecodeState,
    memory: DraftCacheView | None,
    row: int,
    nodes: int,
    width: int,
    sharpness: float,
) -> set[tuple[int, ...]]:
    """Return the nodes of a tree of depth 4 that expands the `width` most likely nodes of every depth."""
    root = int(given.roots[row])
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(4):
        found = {
            (*path, token): scores[path] + logp
            for path in frontier
            for token, logp in children_of(output_head, given, memory, row, [root, *path], sharpness).items()
        }
        scores |= found
        frontier = sorted(found, key=lambda path: -found[path])[:width]
    del scores[()]
    return set(sorted(scores, key=lambda path: 1e-4 * len(path) - scores[path])[: nodes - 1])


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_frontier_is_expanded_like_single_nodes(target: Target, name: str) -> None:
    """A node depends on its own path only, a row on its own cache, which may be empty."""
    heads, lengths = noise_heads(target, name, draft_vocab=25 * (list(HEADS).index(name) % 2)), [6, 0, 3]
    output_head = OutputHead(heads, target, torch.float32)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (3, 7), generator=generator)
    features = torch.randn(3, 6, heads.feature_size, generator=generator)
    memory, memories = None, [None] * 3
    if heads.cache_entry_size:
        rows = heads.encode_cache_entry(features, output_head.token(ids[:, 1:], 0), torch.arange(6)[None], 6)
        memory = DraftCacheView(rows, torch.tensor(lengths)[:, None])
        memories = [DraftCacheView(rows[i : i + 1, :n], torch.tensor([[n]]), full=True) for i, n in enumerate(lengths)]  # type: ignore[misc]
    last = torch.stack([features[row, max(0, n - 1)] for row, n in enumerate(lengths)])
    roots = ids[torch.arange(3), torch.tensor(lengths)]
    proposer = HeadsProposer(target, heads, dtype=torch.float32, tree_size=24, width=3, branching=4, max_depth=4)
    draft_cache = None if memory is None else SimpleNamespace(view=lambda: memory)
    for noise, proposer.sharpness in ((None, 1.5), (None, 1.0), (torch.randn(3, 4, 64, generator=generator), 1.5)):
        coming = None if noise is None else LazyGumbel.of(noise)
        state = DecodeState(target, [[0]] * 3, roots, last, coming, 0.7, draft_cache)
        tree = proposer.propose(state, 4)
        for row in range(3):
            grown = {tuple(path[: length + 1]) for path in tree.paths(row) for length in range(len(path))}
            assert grown == best_paths(output_head, state, memories[row], row, 24, 3, proposer.sharpness)
        assert int(tree.depth.max()) > 1
        assert {token for row in tree.tokens[:, 1:].tolist() for token in row} <= set(
            range(64) if output_head.tokens is None else output_head.tokens.tolist()
        )


@pytest.mark.parametrize("name", HEADS)
def test_table_of_encoded_tokens(monkeypatch: pytest.MonkeyPatch, target: Target, name: str) -> None:
    """The table holds the whole vocabulary where one can serve all depths; without it the values are the same."""
    heads = noise_heads(target, name)
    fast = OutputHead(heads, target, torch.float32)
    monkeypatch.setattr(output_head_module, "TABLE_BYTES", 0)
    slow = OutputHead(heads, target, torch.float32)
    assert slow.table is None
    assert (fast.table is None) == (not heads.path_dependent or heads.encode_uses_depth)
    tokens = torch.tensor([[0, 63, 5], [7, 7, 31]])
    with torch.no_grad():
        for depth in range(4):
            torch.testing.assert_close(fast.token(tokens, depth), slow.token(tokens, depth), rtol=1e-5, atol=1e-5)
    if name in ("sequential", "sequential_own"):
        assert not torch.allclose(slow.token(tokens, 0), slow.token(tokens, 1))


def test_output_rows_of_a_draft_vocabulary_with_a_bias() -> None:
    model = tiny("phi", ACCEPTED["phi"])
    target = Target(model, probe=False)
    torch.nn.init.normal_(target.output.bias)
    heads, feature = noise_heads(target, "recurrent", draft_vocab=10), torch.randn(2, 3, 32)
    expected = target.output(feature)[..., heads.draft_tokens]
    torch.testing.assert_close(OutputHead(heads, target, torch.float32).logits(feature, 0), expected)


def test_trees_deeper_than_the_heads(target: Target) -> None:
    heads = noise_heads(target, "block_recurrent", depth=3)
    for options in ({"max_depth": 4}, {"shape": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}):
        with pytest.raises(MedheadError, match="4 deep, but these heads predict 3 tokens ahead"):
            HeadsProposer(target, heads, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["recurrent", "block", "medusa"])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_proposers_share_heads(target: Target, kind: str, first: torch.dtype) -> None:
    """Proposers of several types take turns; the given heads stay unchanged."""
    heads, ids = noise_heads(target, kind), torch.tensor([[5, 6, 7, 5, 6]])
    before = {name: parameter.clone() for name, parameter in heads.named_parameters()}
    expected = Decoder(target, "none").generate(ids, max_new_tokens=12, do_sample=False)
    types = (first, torch.bfloat16, torch.float32)
    decoders = [Decoder(target, "heads", heads=heads, dtype=dtype) for dtype in types]
    for decoder in [*decoders, *decoders]:
        assert torch.equal(decoder.generate(ids, max_new_tokens=12, do_sample=False), expected)
    for name, parameter in heads.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_type_of_heads_is_measured_once(target: Target) -> None:
    """All proposers of a process use the same type."""
    heads = noise_heads(target, "recurrent")
    assert len({Decoder(target, "heads", heads=heads).proposer.output_head.dtype for _ in range(5)}) == 1  # type: ignore[attr-defined]
