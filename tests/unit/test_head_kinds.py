"""Every kind of heads: what training sees is what decoding sees, and both are what the method's paper says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from conftest import HEADS, noise_heads, read
from families import ACCEPTED, tiny
from medhead import Decoder, MedheadError, TokenTree
from medhead.core.gumbel import LazyGumbel
from medhead.heads import Heads, HeadsConfig, build_heads
from medhead.heads import output_head as output_head_module
from medhead.heads.draft_cache import DraftCacheView, TensorDraftCache
from medhead.heads.output_head import OutputHead
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.heads import HeadsProposer
from medhead_training.objective.unroll import PackedBatch, sample_anchors, unroll
from scripted import OracleProposer

BLOCKS = [name for name in HEADS if HEADS[name]["kind"] == "block"]
LOOKING = [name for name in HEADS if HEADS[name]["kind"] in ("attention", "block")]
PROMPTS = [[5, 9, 13, 5, 9], [12], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
ENDS = [2, 33]


def texts_of(documents: list[list[int]]) -> PackedBatch:
    """One document a row; every token is to be guessed."""
    longest = max(map(len, documents))
    ids, document = torch.zeros(len(documents), longest, dtype=torch.long), torch.full((len(documents), longest), -1)
    for row, text in enumerate(documents):
        ids[row, : len(text)], document[row, : len(text)] = torch.tensor(text), 0
    return PackedBatch(ids, document >= 0, document)


# ---------------------------------------------------------------- training equals inference


class Witness(HeadsProposer):
    """DraftTrie what the text will be, with lies, and notes what the heads say along the true text at every pass."""

    def __init__(self, target: Target, heads: Heads, texts: list[list[int]]) -> None:
        super().__init__(target, heads, dtype=torch.float32, sharpness=1.0)
        self.oracle = OracleProposer(texts, target.vocab_size, depth=heads.config.depth)
        self.tree_size = self.oracle.tree_size
        self.said: dict[tuple[int, int, int], Tensor] = {}  # row, position of the root, depth: log-probabilities

    def begin(self, target: Target, texts: list[list[int]]) -> None:
        super().begin(target, texts)
        self.oracle.begin(target, texts)

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self.oracle.keep_rows(rows)

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        depths, vocab = self.heads.config.depth, self.output_head.weight.shape[0]
        expander = self._expander(state, self._view(), vocab, depths)
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
                    self.said[row, len(text) - 1, depth] = logp[place, 0][children[place, 0].argsort()]
        return self.oracle.propose(state, max_depth)


def said_in_training(heads: Heads, target: Target, texts: PackedBatch) -> dict[tuple[int, int, int], Tensor]:
    """The same from one pass over whole texts."""
    found, output_head = {}, OutputHead(heads, target, torch.float32)
    names = torch.arange(target.vocab_size) if output_head.tokens is None else output_head.tokens
    with torch.no_grad(), target.active(heads.config.feature_layers):
        _, features = read(target, texts.ids)
        anchors, real = sample_anchors(texts, 1.0)
        for depth, level in enumerate(unroll(heads, texts, features, target.embedding, anchors, real)):
            logp = output_head.logits(level.features, depth).log_softmax(-1)[:, names.argsort()]
            for row, at, said in zip(level.rows.tolist(), level.at.tolist(), logp, strict=True):
                found[row, at - depth, depth] = said
    return found


@pytest.fixture(scope="module")
def true_texts(model: PreTrainedModel) -> list[list[int]]:
    """Text of every prompt, decoded by itself."""
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": ENDS}
    return [Decoder(model, "none").generate(torch.tensor([prompt]), **options)[0].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("name", HEADS)
def test_decoding_reads_what_training_reads(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, target: Target, true_texts: list[list[int]], name: str
) -> None:
    """Prompts in chunks, several tokens a pass, rows that end, memory that grows: as in one pass over the whole text."""
    monkeypatch.setattr("medhead.model.target.PREFILL_CHUNK", 4)
    monkeypatch.setattr("medhead.heads.draft_cache.PAGE", 8)
    heads: Any = noise_heads(target, name, draft_vocab=30 * (list(HEADS).index(name) % 2))
    if heads.memory_size:
        heads.new_draft_cache = lambda batch, dtype, device, capacity: TensorDraftCache(
            batch, heads.memory_size, dtype, device, 1
        )
    witness = Witness(target, heads, true_texts)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    decoder = Decoder(model, witness)
    found = decoder.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=ENDS)
    for row, prompt, text in zip(found.tolist(), PROMPTS, true_texts, strict=True):
        assert row[width - len(prompt) :][: len(text)] == text
    assert decoder.statistics.accepted_length > 1.8
    expected = said_in_training(heads, target, texts_of(true_texts))
    common = [key for key in witness.said if key in expected]
    assert {(row, depth) for row, _, depth in common} >= {(row, depth) for row in range(3) for depth in range(4)}
    for row, root, depth in witness.said:  # all but the first token's own and the last one's, which nobody trains on
        assert (row, root, depth) in common or root == 0 or root + depth + 1 == len(true_texts[row])
    torch.testing.assert_close(
        torch.stack([witness.said[key] for key in common]),
        torch.stack([expected[key] for key in common]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", HEADS)
def test_documents_of_a_row_do_not_see_each_other(target: Target, name: str) -> None:
    """Packed behind each other or alone: the heads say the same."""
    heads = noise_heads(target, name)
    generator = torch.Generator().manual_seed(1)
    sizes, rows = (9, 7, 12, 6), ((0, 1), (2, 3))
    documents = [torch.randint(0, 64, (size,), generator=generator) for size in sizes]
    features = [torch.randn(size, heads.feature_size, generator=generator) for size in sizes]

    def said(texts: PackedBatch, of_texts: Tensor, places: dict[tuple[int, int], tuple[int, int]]) -> dict[Any, Tensor]:
        anchors, real = sample_anchors(texts, 1.0)
        found = {}
        for depth, level in enumerate(unroll(heads, texts, of_texts, target.embedding, anchors, real)):
            for row, at, feature in zip(level.rows.tolist(), level.at.tolist(), level.features, strict=True):
                found[places[row, at], depth] = feature
        return found

    packed = texts_of([torch.cat([documents[i] for i in row]).tolist() for row in rows])
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
        alone |= said(texts_of([text.tolist()]), features[document][None], own)
    with torch.no_grad():
        together = said(packed, of_packed, places)
    assert together.keys() == alone.keys()
    assert len(together) == sum(size - 2 - depth for size in sizes for depth in range(4))
    for key, feature in together.items():
        torch.testing.assert_close(feature, alone[key].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOOKING)
def test_one_anchor_or_many(target: Target, name: str) -> None:
    """Blocks of different anchors do not see each other, and rows of a batch do not either."""
    heads = noise_heads(target, name)
    torch.manual_seed(2)
    texts = texts_of([torch.randint(0, 64, (size,)).tolist() for size in (14, 9)])
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
def test_fewer_levels_say_the_same(target: Target, name: str) -> None:
    """Also a causal block, which then leaves out its later slots; any other block runs whole."""
    heads = noise_heads(target, name)
    torch.manual_seed(3)
    texts, features = texts_of([torch.randint(0, 64, (10,)).tolist()]), torch.randn(1, 10, heads.feature_size)
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
    memory = DraftCacheView(torch.randn(1, 5, heads.memory_size), torch.tensor([[5]]), full=True)
    root = heads.encode(target.embed(torch.tensor([[7]])), 0)
    features = torch.randn(1, 1, heads.feature_size)
    extra = 0 if heads.config.anchor_predicts else 1
    for depth in (1, 3):
        slots = heads.start(features, root, memory, depth).shared
        assert slots.shape[2] == (depth if heads.config.causal else 4) + extra
    whole = heads.start(features, root, memory).shared
    assert whole.shape[2] == 4 + extra
    torch.testing.assert_close(slots, whole[:, :, : slots.shape[2]], rtol=1e-5, atol=1e-5)
    for other in range(
        1, 4 + extra
    ):  # what a later mask says reaches earlier slots if and only if the block is not causal
        changed: Any = noise_heads(target, name)
        if changed.mask_embedding is None:
            return
        changed.mask_embedding.data[other] += 1.0
        moved = (changed.start(features, root, memory).shared != whole).any(-1)[0, 0]
        assert moved[other:].all()
        assert moved[:other].any() == (not heads.config.causal)


# ---------------------------------------------------------------- against the papers


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """`[heads, tokens, dim]` turned by transformers."""
    config = LlamaConfig(head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    return apply_rotary_pos_emb(x[None], x[None], *LlamaRotaryEmbedding(config)(x, positions[None]))[0][0]


def split(x: Tensor, dim: int = 8) -> Tensor:
    """`[tokens, heads * dim]` to `[heads, tokens, dim]`."""
    return x.unflatten(-1, (-1, dim)).transpose(0, 1)


def eagle(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """EAGLE-3 at one anchor: a decoder layer over [embedding of the next token; feature], its outputs fed back."""
    layer, attention, fused = heads.midlayer, heads.midlayer.self_attn, heads.fc(features)
    stream, found = [(embeddings[at + 1], fused[at]) for at in range(anchor + 1)], []
    for depth in range(4):
        x = torch.stack([torch.cat([layer.input_layernorm(e), layer.hidden_norm(f)]) for e, f in stream])
        positions = torch.arange(len(x))
        query = rope(split(attention.q_proj(x)), positions)[:, -1:]
        key, value = rope(split(attention.k_proj(x)), positions), split(attention.v_proj(x))
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], enable_gqa=True)[0, :, 0].flatten()
        residual = layer.hidden_norm(stream[-1][1]) if heads.config.norm_before_residual else stream[-1][1]
        hidden = residual + attention.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        found.append(heads.norm(hidden))
        stream.append((embeddings[anchor + 2 + depth], hidden))
    return found


def block(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """A block at one anchor: queries from [root, masks], keys and values from the features before it and from itself."""
    config, context = heads.config, heads.hidden_norm(heads.fc(features[: anchor + 1]))
    slots, root = heads.slots, embeddings[anchor + 1]
    if config.mask_token < 0:
        x = torch.cat([(root + heads.mask_embedding[0])[None], heads.mask_embedding[1:]])
    else:
        x = torch.stack([root] + [heads.mask_row] * (slots - 1))
    positions = torch.arange(anchor + 1 + slots)
    seen = torch.ones(slots, len(positions), dtype=torch.bool)
    if config.causal:
        seen = seen.tril(anchor + 1)
    for layer in heads.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        query = rope(attention.q_norm(split(attention.q_proj(normed))), positions[-slots:])
        both = torch.cat([context, normed])
        key, value = rope(attention.k_norm(split(attention.k_proj(both))), positions), split(attention.v_proj(both))
        out = F.scaled_dot_product_attention(query[None], key[None], value[None], seen, enable_gqa=True)[0]
        x = x + attention.o_proj(out.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    found, state = [], context[anchor]
    for depth, slot in enumerate(x if config.anchor_predicts else x[1:]):
        token = embeddings[anchor + 1 + depth]
        if config.correction == "recurrent":
            state = heads.cell(state, heads.cell.encode(token), depth)
            found.append(heads.norm(slot + state))
        else:
            found.append(heads.norm(slot) + (heads.parent(token) if config.correction == "parent" else 0.0))
    return found


def sequential(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """`MLPSpeculator` (arXiv 2404.19124) with factored matrices."""
    config, state, found = heads.config, features[anchor], []
    state_weight = 0.5 ** (0.5 / config.depth)
    token_weight = (1 - state_weight**2) ** 0.5 * (config.inner_size / 2) ** 0.5
    if config.scale_input:
        state = state / (2 * (state.square().mean() + 1e-6)).sqrt()
    for depth in range(4):
        at = 0 if config.tied else depth
        token = embeddings[anchor + 1 + depth]
        token = heads.embeddings[at][token] if config.own_embedding else heads.encoders[at](token)
        project = heads.first if depth == 0 else heads.proj[0 if config.tied else depth - 1]
        z = project(state) + token_weight / state_weight * token
        z = z / (z.square().mean() + 1e-6).sqrt() * heads.norms[at].weight + heads.norms[at].bias
        state = F.gelu(z)
        found.append(state if config.own_output else heads.outputs[at](state))
    return found


def medusa(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """Residual blocks on the hidden state, and what the parent's token adds."""
    found = []
    for depth in range(4):
        x = features[anchor]
        for one in heads.heads[depth]:
            x = x + F.silu(F.linear(x, one.linear.weight, one.linear.bias))
        found.append(x if heads.correction is None else x + heads.correction(embeddings[anchor + 1 + depth]))
    return found


def recurrent(heads: Any, features: Tensor, embeddings: Tensor, anchor: int) -> list[Tensor]:
    """A state taken along the path by one cell."""
    state, found = features[anchor], []
    for depth in range(4):
        state = heads.cell(state, heads.cell.encode(embeddings[anchor + 1 + depth]), depth)
        found.append(heads.output_norm(state))
    return found


REFERENCES = {
    "attention": eagle,
    "block": block,
    "sequential": sequential,
    "medusa": medusa,
    "recurrent": recurrent,
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_kind_is_what_its_paper_says(target: Target, name: str) -> None:
    heads: Any = noise_heads(target, name)
    torch.manual_seed(4)
    texts, features = texts_of([torch.randint(0, 64, (11,)).tolist()]), torch.randn(1, 11, heads.feature_size)
    anchors, real = sample_anchors(texts, 1.0)
    embeddings = target.embed(texts.ids[0])
    if HEADS[name].get("own_embedding"):
        embeddings = texts.ids[0] if name == "sequential_own" else heads.embed_tokens[texts.ids[0]]
    levels = list(unroll(heads, texts, features, target.embedding, anchors, real))
    for anchor in (0, 1, 5):
        expected = REFERENCES[heads.config.kind](heads, features[0], embeddings, anchor)
        assert len(expected) == len(levels) == 4
        for depth, level in enumerate(levels):
            found = level.features[level.at == anchor + 1 + depth][0]
            torch.testing.assert_close(found, expected[depth], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- proposing


def children_of(
    output_head: OutputHead,
    given: DecodeState,
    memory: DraftCacheView | None,
    row: int,
    path: list[int],
    sharpness: float,
) -> dict[int, float]:
    """The four likeliest children of a node and their log-probabilities, from a run of the heads over its path alone."""
    heads = output_head.heads
    codes = [output_head.token(torch.tensor([[token]]), depth) for depth, token in enumerate(path)]
    draft = heads.start(given.features[row : row + 1, None], codes[0], memory)
    state = draft.state
    for depth, code in enumerate(codes):
        state, feature = heads.advance(state, code, depth, draft.shared)
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
    """The nodes of a tree of depth 4 that goes on from the `width` likeliest nodes of every depth."""
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
def test_a_frontier_is_expanded_as_if_node_by_node(target: Target, name: str) -> None:
    """Each node knows its own path and no other's; rows know their own memory, also one that has none yet."""
    heads, lengths = noise_heads(target, name, draft_vocab=25 * (list(HEADS).index(name) % 2)), [6, 0, 3]
    output_head = OutputHead(heads, target, torch.float32)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (3, 7), generator=generator)
    features = torch.randn(3, 6, heads.feature_size, generator=generator)
    memory, memories = None, [None] * 3
    if heads.memory_size:
        rows = heads.encode_cache_entry(features, output_head.token(ids[:, 1:], 0), torch.arange(6)[None], 6)
        memory = DraftCacheView(rows, torch.tensor(lengths)[:, None])
        memories = [DraftCacheView(rows[i : i + 1, :n], torch.tensor([[n]]), full=True) for i, n in enumerate(lengths)]  # type: ignore[misc]
    last = torch.stack([features[row, max(0, n - 1)] for row, n in enumerate(lengths)])
    roots = ids[torch.arange(3), torch.tensor(lengths)]
    proposer = HeadsProposer(target, heads, dtype=torch.float32, tree_size=24, width=3, branching=4, max_depth=4)
    proposer._memory = SimpleNamespace(view=lambda: memory)  # type: ignore[assignment]
    for noise, proposer.sharpness in ((None, 1.5), (None, 1.0), (torch.randn(3, 4, 64, generator=generator), 1.5)):
        coming = None if noise is None else LazyGumbel.of(noise)
        state = DecodeState(target, [[0]] * 3, roots, last, coming, 0.7)
        tree = proposer.propose(state, 4)
        for row in range(3):
            grown = {tuple(path[: length + 1]) for path in tree.paths(row) for length in range(len(path))}
            assert grown == best_paths(output_head, state, memories[row], row, 24, 3, proposer.sharpness)
        assert int(tree.depth.max()) > 1
        assert {token for row in tree.tokens[:, 1:].tolist() for token in row} <= set(
            range(64) if output_head.tokens is None else output_head.tokens.tolist()
        )


@pytest.mark.parametrize("name", HEADS)
def test_tokens_encoded_ahead(monkeypatch: pytest.MonkeyPatch, target: Target, name: str) -> None:
    """A table of the whole vocabulary where that can be, and the same codes without one."""
    heads = noise_heads(target, name)
    fast = OutputHead(heads, target, torch.float32)
    monkeypatch.setattr(output_head_module, "TABLE_BYTES", 0)
    slow = OutputHead(heads, target, torch.float32)
    assert slow.table is None
    assert (fast.table is None) == (not heads.per_path or heads.encodes_by_depth)
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


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "hydra"}, "no kind of heads is called 'hydra'; known kinds: attention, block, medusa, recurrent"),
        ({"depth": 0}, "depth of the heads must be a whole number of at least 1, got 0"),
        ({"depth": 2.5}, "depth of the heads must be a whole number"),
        ({"blocks": -1}, "blocks of the heads must be"),
        ({"inner_size": 0}, "inner_size of the heads must be"),
        ({"head_dim": 0}, "head_dim of the heads must be"),
        ({"tree_size": 0}, "tree_size of the heads must be"),
        ({"draft_vocab": 65}, "draft_vocab must be from 0 to the vocabulary's 64, got 65"),
        ({"draft_vocab": -1}, "draft_vocab must be from 0"),
        ({"tree_depth": 5}, "tree_depth must be from 0 to the heads' depth 4, got 5"),
        ({"correction": "hope"}, "correction must be one of none, parent, recurrent, got 'hope'"),
        ({"correction": "parent"}, "heads of kind 'recurrent' know the corrections none; got 'parent'"),
        ({"kind": "medusa", "correction": "recurrent"}, "'medusa' know the corrections none, parent; got 'recurrent'"),
        ({"kind": "sequential", "correction": "parent"}, "'sequential' know the corrections none"),
        ({"kind": "attention", "correction": "recurrent"}, "'attention' know the corrections none"),
        ({"kind": "attention", "feature_layers": [2]}, r"layers of the target from 0 to 1, got \[2\]: 2 is none"),
        ({"kind": "attention", "feature_layers": [0, -1]}, "-1 is none"),
        ({"kind": "block", "feature_layers": ["1"]}, "1 is none"),
        ({"kind": "block", "feature_layers": [1, 1]}, r"every layer once, got \[1, 1\]"),
        (
            {"kind": "medusa", "feature_layers": [0, 1]},
            r"'medusa' read one layer of the target, got feature_layers \[0, 1\]",
        ),
        ({"kind": "attention", "num_heads": 4, "key_heads": 3}, "num_heads must be a multiple of key_heads"),
        ({"kind": "block", "head_dim": 7}, "head_dim even, got 4, 2 and 7"),
        ({"kind": "attention", "layer_size": 16}, "width 16 for a target of hidden size 32 needs an embedding"),
    ],
)
def test_what_heads_cannot_be(fields: dict[str, Any], says: str) -> None:
    given = {"kind": "recurrent", "depth": 4, "hidden_size": 32, "vocab_size": 64, "target_layers": 2} | fields
    with pytest.raises(MedheadError, match=says) as refusal:
        build_heads(HeadsConfig(**given))
    assert "\n" not in str(refusal.value)


def test_trees_that_heads_cannot_fill(target: Target) -> None:
    heads = noise_heads(target, "block_recurrent", depth=3)
    for options in ({"max_depth": 4}, {"shape": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}):
        with pytest.raises(MedheadError, match="4 deep, but these heads guess 3 tokens ahead"):
            HeadsProposer(target, heads, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["recurrent", "block", "medusa"])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_proposers_share_heads(target: Target, kind: str, first: torch.dtype) -> None:
    """In several types, in turn; the heads that were given stay what they were."""
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
    """Proposers of one process agree, so that benchmarks compare the same thing."""
    heads = noise_heads(target, "recurrent")
    assert len({Decoder(target, "heads", heads=heads).proposer.output_head.dtype for _ in range(5)}) == 1  # type: ignore[attr-defined]
