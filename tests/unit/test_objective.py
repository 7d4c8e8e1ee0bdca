"""Anchors, levels and gradients of the training objective, against loops over every position."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from conftest import HEADS, noise_heads, read
from medhead.heads import Heads, HeadsConfig
from medhead.heads.draft_cache import DraftCacheView
from medhead.model.target import Target
from medhead_training.objective.unroll import PackedBatch, sample_anchors, unroll


@st.composite
def batches(draw: st.DrawFn) -> PackedBatch:
    """Rows of packed documents with padding at the end, and any mask."""
    length = draw(st.integers(1, 16))
    rows = draw(st.integers(1, 3))
    document = torch.full((rows, length), -1)
    for row in range(rows):
        at = 0
        for number in range(draw(st.integers(0, 4))):
            size = draw(st.integers(1, 8))
            document[row, at : at + size] = number
            at += size
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length)))
    ids = torch.arange(rows * length).view(rows, length) + 7
    return PackedBatch(ids, mask.view(rows, length), document)


def documents(texts: PackedBatch) -> list[list[int]]:
    return texts.document.tolist()


def possible(texts: PackedBatch, ahead: int) -> set[tuple[int, int]]:
    """Positions whose document holds the token `ahead` positions later, which is masked."""
    found = set()
    for row, document in enumerate(documents(texts)):
        for at in range(len(document) - ahead):
            inside = all(document[place] == document[at] != -1 for place in range(at, at + ahead + 1))
            if inside and bool(texts.mask[row, at + ahead]):
                found.add((row, at))
    return found


def pairs(anchors: Tensor, real: Tensor) -> list[tuple[int, int]]:
    return [(row, int(anchors[row, column])) for row, column in real.nonzero().tolist()]


@given(batches())
def test_where_texts_begin(texts: PackedBatch) -> None:
    found = texts.document_starts().tolist()
    for row, document in enumerate(documents(texts)):
        begin = 0
        for at in range(len(document)):
            begin = at if at and document[at] != document[at - 1] else begin
            assert found[row][at] == begin


@given(batches(), st.integers(1, 17))
def test_predictable_positions(texts: PackedBatch, ahead: int) -> None:
    assert set(map(tuple, texts.predictable(ahead).nonzero().tolist())) == possible(texts, ahead)


@given(batches(), st.floats(0.0, 1.0), st.integers(0, 9))
def test_anchors_have_a_root_and_a_first_draft_token(texts: PackedBatch, share: float, seed: int) -> None:
    anchors, real = sample_anchors(texts, share, torch.Generator().manual_seed(seed))
    assert anchors.shape == real.shape
    chosen, allowed = pairs(anchors, real), possible(texts, 2)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= allowed
    assert torch.equal(anchors, anchors.sort(1).values)
    counts = [sum(row == other for other, _ in allowed) for row in range(len(anchors))]
    wanted = max(1, round(share * max(counts)))
    assert [int(row.sum()) for row in real] == [min(wanted, count) for count in counts]
    assert bool(((anchors >= 0) & (anchors < texts.ids.shape[1])).all())
    again = sample_anchors(texts, share, torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], anchors)
    assert torch.equal(again[1], real)


@given(batches())
def test_all_anchors(texts: PackedBatch) -> None:
    anchors, real = sample_anchors(texts, 1.0)
    assert set(pairs(anchors, real)) == possible(texts, 2)


def one_text(length: int, rows: int = 1) -> PackedBatch:
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(length))
    return PackedBatch(ids, torch.ones(rows, length, dtype=torch.bool), torch.zeros(rows, length, dtype=torch.long))


def test_every_anchor_has_the_same_chance() -> None:
    texts, generator, counts = one_text(42), torch.Generator().manual_seed(0), torch.zeros(42)
    for _ in range(1000):
        anchors, real = sample_anchors(texts, 0.25, generator)
        assert anchors.shape == (1, 10)
        counts[anchors[real]] += 1
    assert counts[40:].sum() == 0
    assert float((counts[:40] - 250).abs().max()) < 5 * (1000 * 0.25 * 0.75) ** 0.5


class Echo(Heads):
    """Says the feature it started from and the tokens of its path, and keeps what it was given to look at."""

    cache_entry_size = 3

    def __init__(self, depth: int) -> None:
        super().__init__(HeadsConfig("recurrent", depth, 1, 64, 2))
        self.memory: Any = None

    def encode_cache_entry(self, features: Tensor, token: Tensor, positions: Tensor, max_len: int) -> Tensor:
        assert int(positions.max()) < max_len
        return torch.cat([features, token, positions[..., None].expand_as(token)], -1)

    def init_state(
        self, features: Tensor, root: Tensor, cache: DraftCacheView | None, depth: int | None = None
    ) -> tuple[Tensor, Any]:
        self.memory = cache
        return features, None

    def step(self, state: Tensor, token: Tensor, depth: int, context: Any) -> tuple[Tensor, Tensor]:
        state = torch.cat([state, token], -1)
        return state, state


@given(batches(), st.floats(0.1, 1.0), st.integers(1, 5))
def test_levels_follow_the_text(texts: PackedBatch, share: float, depth: int) -> None:
    """Each anchor's path is the text after it; a level names the position whose distribution is predicted."""
    if texts.ids.shape[1] < 2:
        return
    heads, rows = Echo(depth), texts.ids.shape[0]
    features = torch.arange(texts.ids.numel()).view(rows, -1, 1).double()
    anchors, real = sample_anchors(texts, share, torch.Generator().manual_seed(1))
    chosen = pairs(anchors, real)
    levels = list(unroll(heads, texts, features, lambda ids: ids[..., None].double(), anchors, real))
    assert len(levels) == depth
    for level, drafted in enumerate(levels):
        expected = [(row, at + 1 + level) for row, at in chosen if (row, at) in possible(texts, 2 + level)]
        assert list(zip(drafted.rows.tolist(), drafted.at.tolist(), strict=True)) == expected
        for feature, (row, at) in zip(drafted.features.tolist(), expected, strict=True):
            anchor = at - 1 - level
            assert feature == [features[row, anchor].item(), *texts.ids[row, anchor + 1 : at + 1].tolist()]
            assert texts.mask[row, at + 1]
    seen, begins = heads.memory.visible(), texts.document_starts()
    for row, column in real.nonzero().tolist():
        anchor = int(anchors[row, column])
        looked = heads.memory.rows[row][seen[row, column]].tolist()
        places = range(int(begins[row, anchor]), anchor + 1)
        assert looked == [[features[row, p].item(), float(texts.ids[row, p + 1]), float(p)] for p in places]
        assert int(heads.memory.end[row, column]) == anchor + 1  # the root's position


@pytest.mark.parametrize("name", HEADS)
def test_nothing_of_the_future_is_seen(target: Target, name: str) -> None:
    """At depth d of anchor t: features up to t, tokens up to t+1+d."""
    heads, anchor = noise_heads(target, name), torch.tensor([[4]])
    texts, real = one_text(12), torch.ones(1, 1, dtype=torch.bool)
    features = torch.randn(1, 12, heads.feature_size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draft_features(ids: Tensor, features: Tensor, level: int) -> Tensor:
        levels = unroll(heads, PackedBatch(ids, texts.mask, texts.document), features, target.embedding, anchor, real)
        return list(levels)[level].features

    for level in range(4):
        true = draft_features(texts.ids, features, level)
        ids, later = texts.ids.clone(), features.clone()
        ids[:, 6 + level :] = 63 - ids[:, 6 + level :]
        later[:, 5:] += 1.0
        assert torch.equal(draft_features(ids, later, level), true)
        ids[:, 5 + level] = 63 - ids[:, 5 + level]
        assert torch.equal(draft_features(ids, features, level), true) == (
            not heads.path_dependent and (level > 0 or not heads.cache_entry_size)
        )
        later = features.clone()
        later[:, 4] += 1.0
        assert not torch.equal(draft_features(texts.ids, later, level), true)
        later = features.clone()
        later[:, :4] += 1.0
        assert torch.equal(draft_features(texts.ids, later, level), true) == (not heads.cache_entry_size)


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_learns_and_the_target_does_not(model: PreTrainedModel, name: str) -> None:
    frozen = deepcopy(model).requires_grad_(False)
    target = Target(frozen, probe=False)
    heads, texts = noise_heads(target, name), one_text(11, rows=2)
    texts.mask[1] = False  # a row without anchors beside one that has them
    with target.listening(heads.config.feature_layers):
        _, features = read(target, texts.ids)
    anchors, real = sample_anchors(texts, 1.0)
    assert real.sum(1).tolist() == [9, 0]
    loss = torch.zeros(())
    for depth, level in enumerate(unroll(heads, texts, features, target.embedding, anchors, real)):
        own = heads.own_output(depth)
        logits = level.features @ (target.output.weight if own is None else own).T
        loss = loss + torch.nn.functional.cross_entropy(logits, texts.ids[level.rows, level.at + 1])
    loss.backward()
    for parameter_name, parameter in heads.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all()), parameter_name
        assert bool(parameter.grad.any()), parameter_name
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("name", ["attention", "block_recurrent", "medusa"])
def test_features_get_gradients_where_the_target_is_trained_too(target: Target, name: str) -> None:
    """Of the text up to each anchor; of the anchor alone for heads that do not look back."""
    heads, texts = noise_heads(target, name), one_text(10)
    features = torch.randn(1, 10, heads.feature_size, requires_grad=True)
    anchors, real = torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.bool)
    sum(
        level.features.square().sum() for level in unroll(heads, texts, features, target.embedding, anchors, real)
    ).backward()  # type: ignore[union-attr]
    assert features.grad is not None
    reached = features.grad[0].any(-1).nonzero()[:, 0].tolist()
    assert reached == ([5] if name == "medusa" else list(range(6)))


@pytest.mark.parametrize("name", ["attention", "block_recurrent", "block_dflash"])
@pytest.mark.parametrize("length", [256, 257])
def test_rows_without_anchors_point_nowhere(target: Target, name: str, length: int) -> None:
    """Tables of positions end at powers of two: what only fills a row up must not ask for more."""
    heads, texts = noise_heads(target, name), one_text(length, rows=2)
    texts.mask[0, : length - 8] = False
    texts.mask[1] = False
    features = torch.randn(2, length, heads.feature_size)
    anchors, real = sample_anchors(texts, 0.5)
    with torch.no_grad():
        for level in unroll(heads, texts, features, target.embedding, anchors, real):
            assert set(level.rows.tolist()) <= {0}
            assert bool(level.features.isfinite().all())
