"""Every kind of heads computes the same in training and in decoding, whatever is packed or batched with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import HEADS, noise_heads, packed_batch, read
from medhead import Decoder, TokenTree
from medhead.heads import Heads
from medhead.heads.draft_cache import DraftCacheView, TensorDraftCache
from medhead.heads.output_head import OutputHead
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsExpander, HeadsProposer
from medhead_training.objective.unroll import PackedBatch, sample_anchors, unroll
from scripted import OracleProposer

BLOCKS = [name for name in HEADS if HEADS[name]["kind"] == "block"]
CACHED = [name for name in HEADS if HEADS[name]["kind"] in ("attention", "block")]
PROMPTS = [[5, 9, 13, 5, 9], [12], [20, 21, 22, 23, 24, 25, 26, 27, 30]]
ENDS = [2, 33]


class RecordingProposer(HeadsProposer):
    """Proposes the true text with wrong tokens in between, and records the heads' log-probabilities along the true text."""

    def __init__(self, target: Target, heads: Heads, texts: list[list[int]]) -> None:
        super().__init__(target, heads, dtype=torch.float32, sharpness=1.0)
        self.oracle = OracleProposer(texts, target.vocab_size, depth=heads.config.depth)
        self.tree_size = self.oracle.tree_size
        self.recorded: dict[tuple[int, int, int], Tensor] = {}  # row, position of the root, depth: log-probabilities

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        super().begin(target, texts)
        self.oracle.begin(target, texts)

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self.oracle.keep_rows(rows)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        if max_depth < 1:  # before the first token nothing is read
            return self.oracle.propose(state, max_depth)
        depths, vocab = self.heads.config.depth, self.output_head.weight.shape[0]
        view = None if state.draft_cache is None else state.draft_cache.view()
        expander = HeadsExpander(self.output_head, state, view, vocab, depths, None)
        hidden = expander.start()
        for depth in range(depths):
            tokens, reached = [], []
            for row, text in zip(self.oracle.rows, state.texts, strict=True):
                truth, at = self.oracle.answers[row], len(text) - 1 + depth
                assert truth[: len(text)] == text
                tokens.append(truth[at] if at < len(truth) else 0)
                reached.append(at < len(truth))
            hidden, logp, children = expander.expand(hidden, torch.tensor(tokens)[:, None], depth)
            for place, (row, text) in enumerate(zip(self.oracle.rows, state.texts, strict=True)):
                if reached[place]:
                    self.recorded[row, len(text) - 1, depth] = logp[place, 0][children[place, 0].argsort()]
        return self.oracle.propose(state, max_depth)


def logprobs_in_training(heads: Heads, target: Target, texts: PackedBatch) -> dict[tuple[int, int, int], Tensor]:
    """Return the log-probabilities by row, root position and depth, from one training pass over whole texts."""
    found, output_head = {}, OutputHead(heads, target, torch.float32)
    names = torch.arange(target.vocab_size) if output_head.tokens is None else output_head.tokens
    with torch.no_grad(), target.active(heads.config.feature_layers):
        _, features = read(target, texts.ids)
        anchors, real = sample_anchors(texts, 1.0)
        for depth, level in enumerate(unroll(heads, texts, features, target.embedding, anchors, real)):
            logp = output_head.logits(level.features, depth).log_softmax(-1)[:, names.argsort()]
            for row, at, values in zip(level.rows.tolist(), level.at.tolist(), logp, strict=True):
                found[row, at - depth, depth] = values
    return found


@pytest.fixture(scope="module")
def true_texts(model: PreTrainedModel) -> list[list[int]]:
    """The plain decoding of every prompt."""
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ENDS}
    return [Decoder(model, "none").generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("name", HEADS)
def test_decoding_computes_what_training_computes(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, target: Target, true_texts: list[list[int]], name: str
) -> None:
    """Chunked prompts, several tokens a pass, rows that end and a growing cache give the values of one pass over the text."""
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", 4)
    monkeypatch.setattr("medhead.heads.draft_cache.PAGE", 8)
    heads: Any = noise_heads(target, name, draft_vocab=30 * (list(HEADS).index(name) % 2))
    if heads.cache_entry_size:
        heads.new_draft_cache = lambda dtype, lengths, capacity: TensorDraftCache(
            heads.cache_entry_size, dtype, lengths, 1
        )
    proposer = RecordingProposer(target, heads, true_texts)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    decoder = Decoder(model, proposer)
    found = decoder.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=ENDS)
    for row, prompt, text in zip(found.tolist(), PROMPTS, true_texts, strict=True):
        assert row[width - len(prompt) :][: len(text)] == text
    assert decoder.statistics.accepted_length > 1.8
    expected = logprobs_in_training(heads, target, packed_batch(true_texts))
    common = [key for key in proposer.recorded if key in expected]
    assert {(row, depth) for row, _, depth in common} >= {(row, depth) for row in range(3) for depth in range(4)}
    for row, root, depth in proposer.recorded:  # training leaves out a text's last token
        assert (row, root, depth) in common or root + depth + 1 == len(true_texts[row])
    torch.testing.assert_close(
        torch.stack([proposer.recorded[key] for key in common]),
        torch.stack([expected[key] for key in common]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", HEADS)
def test_documents_of_a_row_do_not_see_each_other(target: Target, name: str) -> None:
    """The heads compute the same for documents packed into a row and for single ones."""
    heads = noise_heads(target, name)
    generator = torch.Generator().manual_seed(1)
    sizes, rows = (9, 7, 12, 6), ((0, 1), (2, 3))
    documents = [torch.randint(0, 64, (size,), generator=generator) for size in sizes]
    features = [torch.randn(size, heads.feature_size, generator=generator) for size in sizes]

    def computed(
        texts: PackedBatch, of_texts: Tensor, places: dict[tuple[int, int], tuple[int, int]]
    ) -> dict[Any, Tensor]:
        anchors, real = sample_anchors(texts, 1.0)
        found = {}
        for depth, level in enumerate(unroll(heads, texts, of_texts, target.embedding, anchors, real)):
            for row, at, feature in zip(level.rows.tolist(), level.at.tolist(), level.features, strict=True):
                found[places[row, at], depth] = feature
        return found

    packed = packed_batch([torch.cat([documents[i] for i in row]).tolist() for row in rows])
    of_packed = torch.zeros(2, packed.ids.shape[1], heads.feature_size)
    places, alone = {}, {}
    for row, members in enumerate(rows):
        start = 0
        for document in members:
            size = sizes[document]
            packed.document[row, start : start + size] = document - members[0]
            of_packed[row, start : start + size] = features[document]
            places |= {(row, start + at): (document, at) for at in range(size)}
            start += size
    for document, text in enumerate(documents):
        own = {(0, at): (document, at) for at in range(len(text))}
        alone |= computed(packed_batch([text.tolist()]), features[document][None], own)
    with torch.no_grad():
        together = computed(packed, of_packed, places)
    assert together.keys() == alone.keys()
    assert len(together) == sum(size - 2 - depth for size in sizes for depth in range(4))
    for key, feature in together.items():
        torch.testing.assert_close(feature, alone[key].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CACHED)
def test_one_anchor_or_many(target: Target, name: str) -> None:
    """Neither anchors of a text nor rows of a batch see each other."""
    heads = noise_heads(target, name)
    torch.manual_seed(2)
    texts = packed_batch([torch.randint(0, 64, (size,)).tolist() for size in (14, 9)])
    features = torch.randn(2, 14, heads.feature_size)
    anchors, real = sample_anchors(texts, 1.0)
    with torch.no_grad():
        many = list(unroll(heads, texts, features, target.embedding, anchors, real))
        for row, column in real.nonzero().tolist():
            here, anchor = slice(row, row + 1), anchors[row : row + 1, column : column + 1]
            one = PackedBatch(texts.ids[here], texts.mask[here], texts.document[here])
            single = unroll(heads, one, features[here], target.embedding, anchor, torch.ones(1, 1, dtype=torch.bool))
            for depth, (few, all_) in enumerate(zip(single, many, strict=True)):
                match = (all_.rows == row) & (all_.at == anchor[0, 0] + 1 + depth)
                torch.testing.assert_close(few.features, all_.features[match], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_fewer_depths_give_the_same_values(target: Target, name: str) -> None:
    """A causal block leaves out its later slots; any other block runs whole."""
    heads = noise_heads(target, name)
    torch.manual_seed(3)
    texts, features = packed_batch([torch.randint(0, 64, (10,)).tolist()]), torch.randn(1, 10, heads.feature_size)
    anchors, real = sample_anchors(texts, 1.0)
    with torch.no_grad():
        full = list(unroll(heads, texts, features, target.embedding, anchors, real))
        for depth in (1, 2, 3):
            short = list(unroll(heads, texts, features, target.embedding, anchors, real, depth))
            assert len(short) == depth
            for few, all_ in zip(short, full, strict=False):
                torch.testing.assert_close(few.features, all_.features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_causal_block_computes_only_what_is_asked(target: Target, name: str) -> None:
    heads = noise_heads(target, name)
    memory = DraftCacheView(torch.randn(1, 5, heads.cache_entry_size), torch.tensor([[5]]), full=True)
    root = heads.encode(target.embed(torch.tensor([[7]])), 0)
    features = torch.randn(1, 1, heads.feature_size)
    extra = 0 if heads.config.root_slot_predicts else 1
    for depth in (1, 3):
        slots = heads.init_state(features, root, memory, depth)[1]
        assert slots.shape[2] == (depth if heads.config.causal else 4) + extra
    whole = heads.init_state(features, root, memory)[1]
    assert whole.shape[2] == 4 + extra
    torch.testing.assert_close(slots, whole[:, :, : slots.shape[2]], rtol=1e-5, atol=1e-5)
    for other in range(1, 4 + extra):  # a later mask changes earlier slots if and only if the block is not causal
        changed: Any = noise_heads(target, name)
        if changed.mask_embedding is None:
            return
        changed.mask_embedding.data[other] += 1.0
        moved = (changed.init_state(features, root, memory)[1] != whole).any(-1)[0, 0]
        assert moved[other:].all()
        assert moved[:other].any() == (not heads.config.causal)
