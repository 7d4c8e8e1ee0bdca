"""Compiled loops for the guesses of heads: numbers as PyTorch's, candidates as `growth.grow`'s, texts as plain decoding's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import noise_heads, tiny_llama
from medhead import Decoder
from medhead.core.gumbel import LazyGumbel
from medhead.core.tree import TokenTree
from medhead.errors import MedheadError
from medhead.model.target import Target
from medhead.proposers.base import DecodeState
from medhead.proposers.growth import grow
from medhead.proposers.heads import HeadsProposer
from medhead.proposers.native_growth import NativeGrowth
from medhead_kernels.availability import has_numba

loops = pytest.importorskip("medhead_kernels.loops", reason="needs numba (the extra 'cpu')", exc_type=ImportError)
NATIVE = ["recurrent", "sequential", "sequential_tied"]


@loops.loop
def _each(values, which, out):
    for i in range(values.shape[0]):
        if which == 0:
            out[i] = loops.exp(values[i])
        elif which == 1:
            out[i] = loops.silu(values[i])
        else:
            out[i] = loops.gelu(values[i])


@pytest.mark.parametrize(("which", "reference"), [(0, torch.exp), (1, F.silu), (2, F.gelu)])
def test_functions_of_a_number(which: int, reference: object) -> None:
    values = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([0.0])])
    out = torch.empty_like(values)
    _each(values.numpy(), which, out.numpy())
    torch.testing.assert_close(out, reference(values), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 7), st.booleans())
def test_products(outs: int, size: int, rows: int, half: bool) -> None:
    torch.manual_seed(outs * 100 + size)
    weight, x = torch.randn(outs, size), torch.randn(8, size)
    weight = weight.bfloat16() if half else weight
    out = np.full((8, outs), 7, np.float32)
    loops.product(loops.array_of(weight), x.numpy(), rows, out)
    torch.testing.assert_close(torch.from_numpy(out[:rows]), F.linear(x[:rows], weight.float()), rtol=1e-4, atol=1e-4)
    assert (out[rows:] == 7).all()  # what lies behind is left alone


def test_layer_norm() -> None:
    x, weight, out = 3 + torch.randn(37), torch.randn(37), torch.empty(37)
    loops.layer_norm(x.numpy(), weight.numpy(), np.float32(1e-5), out.numpy())
    torch.testing.assert_close(out, F.layer_norm(x, (37,), weight, eps=1e-5), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
def test_children(seed: int, rows: int, branching: int, noisy: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(6, 23, generator=generator)
    names = torch.randperm(50, generator=generator)[:23]
    noise = torch.randn(50, generator=generator) if noisy else torch.empty(0)
    bias = torch.randn(23, generator=generator) if biased else torch.empty(0)
    parent_index = torch.randn(rows, generator=generator)
    scores, tokens = np.empty((rows, branching), np.float32), np.empty((rows, branching), np.int64)
    wanted = logits[:rows] + (bias if biased else 0)
    wanted = wanted * 0.7 + (noise[names] if noisy else 0)
    top = wanted.log_softmax(-1).topk(branching, -1)
    loops.children(
        logits.numpy(), rows, bias.numpy(), 0.7, noise.numpy(), names.numpy(), parent_index.numpy(), scores, tokens
    )
    assert torch.equal(torch.from_numpy(tokens), names[top.indices])
    torch.testing.assert_close(torch.from_numpy(scores), top.values + parent_index[:, None], rtol=1e-5, atol=1e-5)


def test_children_of_what_is_no_number_are_tokens_all_the_same() -> None:
    """Broken heads may waste time, never more: an index out of range would read whatever lies there."""
    logits, names = np.full((1, 9), np.nan, np.float32), np.arange(9)
    scores, tokens = np.empty((1, 3), np.float32), np.full((1, 3), 10**6)
    empty = np.zeros(0, np.float32)
    loops.children(logits, 1, empty, 1.0, empty, names, np.zeros(1, np.float32), scores, tokens)
    assert (tokens == 0).all()


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20, unique=True), st.data())
def test_likeliest(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    scores = np.array(values, np.float32)
    best, places = np.empty(count, np.float32), np.empty(count, np.int64)
    loops.likeliest(scores, count, best, places)
    assert best.tolist() == sorted(scores.tolist(), reverse=True)[:count]
    assert scores[places].tolist() == best.tolist()
    assert loops.count_above(scores, best[-1]) == count - 1


def proposer(target: Target, name: str, native: bool | None, draft_vocab: int = 0, **options: object) -> HeadsProposer:
    heads = noise_heads(
        target, name, depth=5, draft_vocab=draft_vocab, **({"scale_input": False} if "tied" in name else {})
    )
    made = HeadsProposer(target, heads, native=native, **options)  # type: ignore[arg-type]
    made.begin(target, [[1, 2]])
    return made


@settings(max_examples=30)
@given(
    st.sampled_from(NATIVE), st.integers(0, 999), st.integers(1, 6), st.integers(1, 4), st.sampled_from([0, 40]),
    st.sampled_from([None, 2, 5, 12]), st.sampled_from([0.0, 0.05]), st.sampled_from([None, 0.6, 1.7]),
)  # fmt: skip
def test_candidates_are_those_of_tensor_operations(
    target: Target, name: str, seed: int, width: int, branching: int, draft_vocab: int, nodes: int | None, least: float,
    temperature: float | None,
) -> None:  # fmt: skip
    made = proposer(target, name, True, draft_vocab, width=width, branching=branching, tree_size=12)
    torch.manual_seed(seed)
    noise = None if temperature is None else LazyGumbel.of(torch.randn(1, 5, target.vocab_size))
    roots, features = torch.randint(0, target.vocab_size, (1,)), torch.randn(1, target.hidden_size)
    state = DecodeState(target, [[1, 2]], roots, features, noise, temperature or 1.0)
    with torch.inference_mode():
        found = made._grown_natively(state, 5, nodes, least)
        wanted = grow(roots, made._expander(state, None, branching, 5), 5, width, nodes, least)
    assert found.levels == wanted.levels
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.parent_index, wanted.parent_index)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("kind", ["heads", "hybrid"])
@pytest.mark.parametrize("sampled", [False, True])
def test_texts_are_those_of_plain_decoding(target: Target, name: str, kind: str, sampled: bool) -> None:
    heads = noise_heads(target, name, **({"scale_input": False} if "tied" in name else {}))
    ids = torch.tensor([[5, 9, 31, 7]])
    options = {"do_sample": sampled, "max_new_tokens": 40, **({"seed": 3} if sampled else {})}
    plain = Decoder(target.model, "none").generate(ids, **options)
    with Decoder(target.model, kind, heads=heads, native=True) as decoder:
        assert torch.equal(decoder.generate(ids, **options), plain)


def test_no_deeper_than_there_is_room(target: Target) -> None:
    growth = proposer(target, "recurrent", True, max_depth=2)._native
    assert growth is not None
    assert len(growth.grow(3, torch.randn(1, target.hidden_size), 5, 1.0).levels) == 2


def test_a_batch_is_left_to_tensor_operations(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    made = proposer(target, "recurrent", True)
    monkeypatch.setattr(NativeGrowth, "grow", None)
    state = DecodeState(target, [[1], [2]], torch.tensor([1, 2]), torch.randn(2, target.hidden_size))
    with torch.inference_mode():
        assert made.propose(state, 3).tokens.shape[0] == 2


@pytest.mark.parametrize("name", ["recurrent", "sequential"])
def test_weights_changed_between_texts_are_seen(name: str) -> None:
    target = Target(tiny_llama())
    made = proposer(target, name, True)
    state = DecodeState(target, [[1, 2]], torch.tensor([4]), torch.randn(1, target.hidden_size))
    with torch.inference_mode():
        before = made._grown_natively(state, 4, None, 0.0)
    for parameter in made.heads.parameters():
        parameter.data = 1.3 * parameter.data
    if name == "sequential":  # recurrent heads have encoded all tokens ahead
        with torch.no_grad():
            target.embedding.weight.mul_(1.1)
    made.begin(target, [[1, 2], [3]])
    with torch.inference_mode():
        after = made._grown_natively(state, 4, None, 0.0)
        wanted = grow(state.roots, made._expander(state, None, made.branching, 4), 4, made.width)
    assert not torch.allclose(before.scores, after.scores)
    torch.testing.assert_close(after.scores, wanted.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["recurrent", "sequential"])
def test_proposers_can_be_copied(target: Target, name: str) -> None:
    growth = proposer(target, name, True)._native
    copied = copy.deepcopy(growth)
    features = torch.randn(1, target.hidden_size)
    assert torch.equal(copied.grow(3, features, 4, 1.0).scores, growth.grow(3, features, 4, 1.0).scores)


@pytest.mark.parametrize("name", NATIVE)
def test_certain_children_are_no_likelier_than_their_parents(target: Target, name: str) -> None:
    """Rounding of large logits must not lift a child above its parent: that would leave the parent out of the tree."""
    made = proposer(target, name, True, width=3, branching=3, sharpness=40.0, tree_size=8)
    with torch.inference_mode():
        for root in range(40):
            features = torch.randn(1, target.hidden_size)
            state = DecodeState(target, [[1, root]], torch.tensor([root]), features)
            found = made._grown_natively(state, 5, None, 0.0)
            parents = torch.cat([torch.zeros(1), found.scores[0]])[found.parent_index[0] + 1]
            assert (found.scores[0] <= parents).all()
            tree = made.propose(state, 5)
            assert torch.equal(TokenTree.from_parents(tree.tokens, tree.parents).depth, tree.depth)


def test_a_row_that_joins_leaves_packed_copies_alone(target: Target) -> None:
    made = proposer(target, "recurrent", None, width=2)
    assert made._native is not None
    made._native._pays[torch.get_num_threads()] = True
    given_back = []
    made.output_head.free = lambda: given_back.append(True)  # type: ignore[method-assign]
    made.fork().begin(target, [[3, 4]])
    assert not given_back


def test_without_a_folder_for_them_loops_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.enable_caching", refuse)
    assert loops.loop(_one_more)(41) == 42


def _one_more(x):
    return x + 1


def test_a_numba_that_cannot_be_used_is_said_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> object:
        raise ImportError("Numba needs NumPy 1.9 or less")

    monkeypatch.setattr("medhead_kernels.availability.loops", broken)
    with pytest.warns(UserWarning, match="Numba needs NumPy 1.9 or less"):
        assert not has_numba.__wrapped__()


def test_the_faster_way_is_measured_once(target: Target) -> None:
    growth = HeadsProposer(target, noise_heads(target))._native
    assert growth is not None
    calls = []
    growth._pays.clear()
    growth.compare(lambda: calls.append("usual") or torch.ones(2000, 2000).sum(), lambda: calls.append("this"))
    assert growth.pays
    assert calls.count("usual") == calls.count("this") > 1
    growth.compare(lambda: calls.append("again"), lambda: calls.append("again"))
    assert "again" not in calls


def test_what_cannot_be_had_is_said(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MedheadError, match="none for these heads of kind 'medusa'"):
        HeadsProposer(target, noise_heads(target, "medusa"), native=True)
    assert HeadsProposer(target, noise_heads(target, "medusa"))._native is None
    monkeypatch.setattr("medhead.proposers.native_growth.has_numba", lambda: False)
    with pytest.raises(MedheadError, match=r"need numba: pip install 'medhead\[cpu\]'"):
        HeadsProposer(target, noise_heads(target), native=True)
    assert HeadsProposer(target, noise_heads(target))._native is None
