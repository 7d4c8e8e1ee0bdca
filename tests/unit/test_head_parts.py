"""Parts that kinds of heads share, against loops and against transformers: draft cache, attention, rotary positions, cell."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fake_cuda import CUDA, fake_cuda, needs_fake_cuda
from medhead.core.lengths import Lengths
from medhead.heads import HeadsConfig, attention_layers, build_heads
from medhead.heads.attention_layers import attend
from medhead.heads.block import BlockHeads
from medhead.heads.cached import join_kv
from medhead.heads.draft_cache import PAGE, DraftCacheView, TensorDraftCache
from medhead.heads.layers import GatedCell, GatedMLP, Rotary, fuse_layers


def visible(memory: DraftCacheView) -> list[list[list[int]]]:
    """Return the indices that every row and query sees, by a loop."""
    found: list[list[list[int]]] = []
    for row, ends in enumerate(memory.end.tolist()):
        begins = [0] * len(ends) if memory.begin is None else memory.begin[row].tolist()
        found.append([list(range(b, min(e, memory.rows.shape[1]))) for b, e in zip(begins, ends, strict=True)])
    return found


@given(st.data(), st.integers(1, 4), st.integers(1, 2 * PAGE))
def test_a_draft_cache_is_a_list_of_entries_for_every_text(data: st.DataObject, batch: int, capacity: int) -> None:
    lengths = Lengths.of([0] * batch)
    store = TensorDraftCache(3, torch.float32, lengths, capacity)
    texts: list[list[list[float]]] = [[] for _ in range(batch)]

    def encode_cache_entry(features: Tensor, token: Tensor, positions: Tensor, max_len: int) -> Tensor:
        assert int(positions.max()) < max_len
        return torch.cat([features, token, positions.expand(features.shape[:2])[..., None].float()], -1)

    for _ in range(data.draw(st.integers(1, 7))):
        count, rows = data.draw(st.integers(1, 40)), len(texts)
        features, token = torch.rand(rows, count, 1), torch.rand(rows, count, 1)
        if data.draw(st.booleans()):
            kept = [data.draw(st.integers(0, count))] * rows
        else:
            kept = data.draw(st.lists(st.integers(0, count), min_size=rows, max_size=rows))
        counts = torch.tensor(kept)
        store.write(encode_cache_entry, features, token, counts)
        lengths.advance(counts)
        for row, text in enumerate(texts):
            for at in range(kept[row]):
                text.append([features[row, at, 0].item(), token[row, at, 0].item(), float(len(text))])
        if rows > 1 and data.draw(st.booleans()):
            going = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
            store.keep_rows(going)
            lengths.keep_rows(going)
            texts = [texts[row] for row in going]
        view = store.view()
        assert lengths.host == view.end[:, 0].tolist() == [len(text) for text in texts]
        assert view.rows.shape == (len(texts), max(map(len, texts)), 3)
        for row, text in enumerate(texts):
            assert view.rows[row, : len(text)].tolist() == text
        seen = view.visible()
        assert (seen is None) == (len({len(text) for text in texts}) == 1)
        if seen is not None:
            assert [[row[0].nonzero()[:, 0].tolist()] for row in seen] == visible(view)


def test_a_draft_cache_doubles_when_it_is_full() -> None:
    lengths, sizes, counts = Lengths.of([0, 0]), [], torch.tensor([60, 60])
    store = TensorDraftCache(5, torch.float16, lengths, 3)
    for _ in range(5):
        store.write(lambda features, *rest: features.to(torch.float16), torch.rand(2, 60, 5), torch.empty(0), counts)
        lengths.advance(counts)
        sizes.append(store.nbytes() // (2 * 5 * 2))
    assert sizes == [64, 128, 256, 256, 512]


@given(st.integers(0, 100), st.booleans())
def test_a_query_sees_from_its_beginning_to_its_end(seed: int, begins: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    end = torch.randint(0, 8, (2, 3), generator=generator)
    begin = torch.randint(0, 8, (2, 3), generator=generator) if begins else None
    memory = DraftCacheView(torch.zeros(2, 7, 1), end, begin)
    seen = memory.visible()
    assert seen is not None
    assert [[query.nonzero()[:, 0].tolist() for query in row] for row in seen] == visible(memory)
    assert DraftCacheView(memory.rows, end, full=True).visible() is None


def attend_by_loops(
    query: Tensor,
    memory: tuple[Tensor, Tensor],
    seen: Tensor | None,
    own: tuple[Tensor, Tensor] | None,
    own_hidden: Tensor | None,
) -> Tensor:
    """Attend with one query after the other."""
    batch, groups, slots, heads, dim = query.shape
    key_heads = memory[0].shape[2]
    found = torch.zeros(batch, groups, slots, heads, dim)
    for b, g, s, h in product(range(batch), range(groups), range(slots), range(heads)):
        of = h // (heads // key_heads)
        pairs = [
            (memory[0][b, i, of], memory[1][b, i, of])
            for i in range(memory[0].shape[1])
            if seen is None or seen[b, g if seen.shape[1] > 1 else 0, i]
        ]
        if own is not None:
            pairs += [
                (own[0][b, g, j, of], own[1][b, g, j, of])
                for j in range(own[0].shape[2])
                if own_hidden is None or not own_hidden[s, j]
            ]
        if pairs:
            weights = torch.stack([query[b, g, s, h] @ key / dim**0.5 for key, _ in pairs]).softmax(0)
            found[b, g, s, h] = sum(w * value for w, (_, value) in zip(weights, pairs, strict=True))  # type: ignore[assignment]
    return found.flatten(-2)


SHAPES = {  # batch, groups, slots, heads, key heads, length of the memory, own keys
    "a frontier": (2, 3, 1, 4, 2, 5, 2),
    "blocks": (2, 3, 4, 4, 2, 6, 4),
    "one key head": (1, 2, 3, 3, 1, 4, 3),
    "all heads": (2, 1, 2, 2, 2, 3, 2),
    "no memory": (2, 2, 3, 4, 2, 0, 3),
    "memory alone": (2, 3, 2, 4, 2, 5, 0),
    "nothing": (1, 2, 2, 2, 1, 0, 0),
}


@pytest.mark.parametrize("masked", ["", "all", "each", "later"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_a_loop(shape: str, masked: str) -> None:
    """Values and gradients are equal; a query that sees no key gets zeros."""
    batch, groups, slots, heads, key_heads, length, count = SHAPES[shape]
    generator, dim = torch.Generator().manual_seed(len(shape)), 6

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dim, generator=generator).requires_grad_()

    query, keys, values = noise(batch, groups, slots, heads), *(noise(batch, length, key_heads) for _ in range(2))
    own = (noise(batch, groups, count, key_heads), noise(batch, groups, count, key_heads)) if count else None
    seen = own_hidden = None
    if masked:
        seen = torch.rand(batch, 1 if masked == "all" else groups, length, generator=generator) < 0.6
        seen[0, 0] = False
    if masked == "later" and slots == count:
        own_hidden = torch.ones(slots, count, dtype=torch.bool).triu(1)
    inputs = [query, keys, values, *(own or ())]
    found = attend(query, (keys, values), seen, own, own_hidden)
    expected = attend_by_loops(query, (keys, values), seen, own, own_hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if masked and not count:
        assert not found[0, 0].any()
    if length or count:
        weight = torch.randn(found.shape, generator=generator)
        ours = torch.autograd.grad((found * weight).sum(), inputs)
        theirs = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if yours is None else yours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["a frontier", "blocks", "memory alone"])
def test_attention_of_some_groups_at_a_time(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are not held together, and computed again in backward, give the same values and gradients."""
    batch, groups, slots, heads, key_heads, length, count = SHAPES[shape]
    torch.manual_seed(0)
    inputs = [torch.randn(batch, groups, slots, heads, 6), *torch.randn(2, batch, length, key_heads, 6)]
    inputs += [*torch.randn(2, batch, groups, count, key_heads, 6)] if count else []
    query, keys, values, *own = (part.requires_grad_() for part in inputs)
    seen = torch.rand(batch, groups, length) < 0.6
    results = []
    for limit in (attention_layers.SCORE_BYTES, 1, 8 * batch * slots * heads * (length + count)):
        monkeypatch.setattr(attention_layers, "SCORE_BYTES", limit)
        found = attend(query, (keys, values), seen, (own[0], own[1]) if own else None)
        results.append((found, torch.autograd.grad(found.square().sum(), [query, keys, values, *own])))
    for found, gradients in results[1:]:
        torch.testing.assert_close(found, results[0][0])
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-4, atol=1e-5)


@needs_fake_cuda
@pytest.mark.parametrize("kind", ["block", "attention"])
def test_attention_under_autocast_on_cuda_is_in_bfloat16(kind: str) -> None:
    """Norms, which autocast on CUDA computes in float32, do not make keys, values and queries float32."""
    config = HeadsConfig(kind=kind, depth=3, hidden_size=16, vocab_size=20, num_target_layers=2, head_dim=4)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        with fake_cuda(), CUDA:
            heads = build_heads(config)
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            features, token = torch.zeros(1, 5, 16, dtype=torch.bfloat16), torch.zeros(1, 5, 16)
            made = heads.encode(token, 0)
            entries = heads.encode_cache_entry(features, made, torch.arange(5)[None], 8)
            assert nn.RMSNorm(16)(features).dtype == torch.float32
            assert entries.dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_attention_in_half_precision() -> None:
    """Types are those of the values, also under autocast; the softmax is in float32."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    own = torch.randn(1, 2, 3, 2, 8), torch.randn(1, 2, 3, 2, 8)
    expected = attend(query, (keys, values), None, own)
    halves = [x.bfloat16() for x in (query, keys, values, *own)]
    found = attend(halves[0], (halves[1], halves[2]), None, (halves[3], halves[4]))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    halves = [x.requires_grad_() for x in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = attend(halves[0], (halves[1], halves[2]), None, (halves[3], halves[4]))
    assert torch.equal(again, found)
    again.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in halves)


SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "old linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "a base of its own": {"rope_type": "default", "rope_theta": 777.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_positions_are_those_of_transformers(name: str) -> None:
    scaling, theta = SCALINGS[name], 5000.0
    ours = Rotary(16, theta, scaling, context=512)
    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"} | (scaling or {})
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, max_position_embeddings=512, rope_parameters=parameters))
    torch.manual_seed(0)
    for longest in (7, 300, 200, 1025):  # tables grow, and are used again
        x, positions = torch.randn(2, 5, 3, 16), torch.randint(0, longest, (2, 5))
        positions[0, 0] = longest - 1
        expected, _ = apply_rotary_pos_emb(x, x, *theirs(x, positions), unsqueeze_dim=2)
        torch.testing.assert_close(ours(x, positions, longest), expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            assert torch.equal(ours(x, positions, longest), ours(x, positions, longest))
    half = ours(x.bfloat16(), positions, 1025)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


def test_tables_made_while_decoding_serve_training() -> None:
    rotary = Rotary(8, 100.0)
    with torch.inference_mode():
        rotary(torch.randn(1, 2, 1, 8), torch.arange(2)[None], 2)
    x = torch.randn(1, 2, 1, 8, requires_grad=True)
    rotary(x, torch.arange(2)[None], 2).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation changes no length


def test_the_cell_is_one_gated_layer_over_state_and_token() -> None:
    torch.manual_seed(0)
    cell = GatedCell(8, 5, 3)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    state, embedding = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    both = torch.cat([F.layer_norm(state, (8,), cell.state_norm.weight),
                      F.layer_norm(embedding, (8,), cell.embedding_norm.weight)], -1)  # fmt: skip
    weight = torch.cat([cell.of_state.weight, cell.of_token.weight], 1)
    for depth in range(3):
        gate, up = F.linear(both, weight, cell.depth_bias[depth]).split(5, -1)
        expected = state + F.linear(F.silu(gate) * up, cell.outer.weight)
        torch.testing.assert_close(cell(state, cell.encode(embedding), depth), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(GatedCell(8, 5, 3)(state, embedding[..., :1].expand(-1, -1, 10), 0), state)  # untrained


def test_layers_are_fused_to_the_last_one_before_training() -> None:
    features = torch.randn(3, 12)
    assert torch.equal(fuse_layers(12, 4)(features), features[:, 8:])


def test_the_gated_feed_forward() -> None:
    mlp, x = GatedMLP(6, 5), torch.randn(2, 6)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_cache_entries_hold_keys_and_values_of_every_layer() -> None:
    config = HeadsConfig("block", 1, 32, 64, 2, num_layers=4, num_heads=5, num_kv_heads=5, head_dim=6)
    pairs = [(torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)) for _ in range(4)]
    entries = torch.cat([part.flatten(-2) for pair in pairs for part in pair], -1)
    heads = BlockHeads(config)
    assert entries.shape[-1] == heads.cache_entry_size
    assert torch.equal(join_kv(pairs), entries)
    for (key, value), (keys, values) in zip(heads.split_kv(entries), pairs, strict=True):
        assert torch.equal(key, keys)
        assert torch.equal(value, values)
    assert [key.shape for key, _ in heads.split_kv(entries[:, :0])] == [(2, 0, 5, 6)] * 4
