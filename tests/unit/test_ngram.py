"""What `ngram` names, against a search through the text with the rule written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_automaton import ends
from torch import Tensor
from transformers import LogitsProcessor

from conftest import tiny_llama
from medhead import Decoder, TokenTree
from medhead.errors import MedheadError
from medhead.model.target import Target
from medhead.proposers import DecodeState, build_proposer
from medhead.proposers.automaton import SuffixAutomaton
from medhead.proposers.ngram import NgramProposer
from medhead.proposers.ppm import TextMemory, escape_mass
from medhead.proposers.trie import DraftTrie, to_token_tree
from scripted import trie_paths

TEXTS = st.lists(st.integers(0, 3), min_size=2, max_size=40)
H = 9.0


def next_probs(text: list[int], path: list[int], longest: int, floor: float) -> dict[int, float]:
    """Return the probabilities of the tokens behind text + path.

    Contexts come longest first; each leaves escape_mass / (weight + escape_mass) to the next, down to `floor`.
    """
    whole = text + path
    contexts: dict[tuple[int, ...], int] = {}
    for length in range(1, min(longest + len(path), len(whole)) + 1):
        places = tuple(end for end in ends(text, whole[-length:]) if end + 1 < len(text))
        unfinished = (
            whole[-length:] == text[-length:]
        )  # the text's own end is one more place, which nothing follows yet
        if places:
            contexts[(*places, -1) if unfinished else places] = length
    probs: dict[int, float] = {}
    rest = 1.0
    for places, length in sorted(contexts.items(), key=lambda item: -item[1]):
        weights = {end: 0.5 ** ((len(text) - 1 - end) / H) for end in places if end >= 0}
        total = sum(weights.values()) + escape_mass(length)
        for end in weights:
            weight = 0.5 ** ((len(text) - 2 - end) / H)  # an occurrence of context and follower ends one token later
            probs[text[end + 1]] = probs.get(text[end + 1], 0.0) + rest * weight / total
        rest *= escape_mass(length) / total
        if rest <= floor:
            break
    return probs


def brute_force(text: list[int], longest: int, depth: int, min_prob: float) -> dict[tuple[int, ...], float]:
    """Every path whose probability is at least `min_prob`."""
    found: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while frontier:
        path, prob = frontier.pop()
        if len(path) == depth:
            continue
        for token, share in next_probs(text, list(path), longest, max(0.02, min_prob / prob)).items():
            below = prob * min(share, 1.0)
            if below >= min_prob:
                found[(*path, token)] = below
                frontier.append(((*path, token), below))
    return found


def trie_of(text: list[int], context: int, nodes: int, depth: int, min_prob: float, half_life: float = H) -> DraftTrie:
    return TextMemory(context, depth, half_life).trie(text, nodes, depth, min_prob)


@given(TEXTS, st.integers(1, 6), st.integers(1, 4))
def test_candidates_are_those_of_a_search(text: list[int], longest: int, depth: int) -> None:
    found = trie_paths(trie_of(text, longest, 10**6, depth, 0.03))
    expected = brute_force(text, longest, depth, 0.03)
    sure = {path for path, prob in expected.items() if prob > 0.0301}
    assert sure <= set(found)
    for path, prob in found.items():
        assert prob == pytest.approx(min(expected.get(path, 0.03), 1.0), rel=1e-3)


@given(TEXTS, st.integers(2, 10))
def test_a_small_tree_holds_the_likeliest(text: list[int], nodes: int) -> None:
    everything = trie_of(text, 4, 10**6, 4, 0.01)
    few = trie_of(text, 4, nodes, 4, 0.01)
    assert len(few) == min(nodes, len(everything))
    assert few.probs == pytest.approx(sorted(everything.probs, reverse=True)[:nodes])
    assert sorted(everything.prune(nodes).probs) == pytest.approx(sorted(few.probs))


@given(TEXTS, st.integers(1, 39))
def test_reading_in_parts_is_reading_at_once(text: list[int], cut: int) -> None:
    parts = TextMemory(4, 4, H)
    parts.trie(text[:cut], 8, 4, 0.01)
    found = trie_paths(parts.trie(text, 20, 4, 0.01))
    assert list(found.items()) == list(trie_paths(trie_of(text, 4, 20, 4, 0.01)).items())


def test_longest_match_first_then_recency_and_count() -> None:
    def first(text: list[int]) -> list[int]:
        return trie_of(text, 8, 9, 1, 0.0).tokens[1:]  # best first

    assert first([1, 2, 3, 4, 5, 3, 6, 1, 2, 3])[0] == 4  # behind (1, 2, 3), though 6 is newer behind (3)
    assert first([3, 4, 9, 3, 6, 9, 0, 3]) == [6, 4]  # the newer one
    assert first([3, 4, 9, 3, 4, 9, 3, 6, 0, 3]) == [4, 6]  # the one that was there more often


def test_a_copy_is_found_at_full_depth() -> None:
    text = [*list(range(10, 40)), 5, 6, *list(range(10, 20))]
    found = trie_of(text, 16, 16, 10, 0.02, 4096)
    assert found.tokens == list(range(19, 30))
    assert found.depths == list(range(11))
    assert found.probs[1] > 0.7


def state(target: Target, texts: list[list[int]]) -> DecodeState:
    roots = torch.tensor([text[-1] for text in texts])
    return DecodeState(target, texts, roots, torch.zeros(len(texts), 1))


def test_rows_have_trees_of_their_own(target: Target) -> None:
    proposer = NgramProposer(target, tree_size=6)
    texts = [[4, 5, 6, 7, 4, 5], [9], [8, 8, 8, 8]]
    proposer.begin(target, texts)
    tree = proposer.propose(state(target, texts), 3)
    assert tree.paths(0)[0][:2] == [6, 7]
    assert set(tree.tokens[1].tolist()) == {9}
    assert tree.paths(2)[0] == [8, 8, 8]
    assert tree.nodes <= 6
    assert int(tree.depth.max()) <= 3
    proposer.keep_rows([2])
    again = proposer.propose(state(target, texts[2:]), 3)
    assert again.paths(0) == [[8, 8, 8]]
    assert proposer.propose(state(target, texts[2:]), 0).nodes == 1


def test_without_repetition_there_is_only_the_root(target: Target) -> None:
    proposer = build_proposer("ngram", target)
    texts = [[4, 5, 6], [7, 8]]
    proposer.begin(target, texts)
    assert proposer.propose(state(target, texts), 10).nodes == 1


class Copies(LogitsProcessor):
    """Makes a model say again what it said 17 tokens ago."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, -17:-16], 1e4)


def test_text_that_repeats_is_copied_in_few_passes() -> None:
    model = tiny_llama(eos_token_id=None, context=400)
    decoder = Decoder(model, "ngram")
    for first in (3, 23):  # nothing of one text is left in the next
        prompt = torch.arange(first, first + 17)[None]
        found = decoder.generate(prompt, max_new_tokens=300, do_sample=False, logits_processor=[Copies()])
        assert torch.equal(found[0], prompt[0].repeat(19)[: 17 + 300])
        assert decoder.statistics.lengths[0] == 1  # nothing was said twice yet
        assert decoder.statistics.accepted_length > 6


def test_wrong_options(target: Target) -> None:
    for options, says in (
        ({"max_context": 0}, "at least 1, got 0"),
        ({"max_depth": 0}, "at least 1"),
        ({"half_life": 0}, "half_life must be at least 1"),
        ({"min_prob": 1.5}, "from 0 to 1"),
        ({"datastore": "./nowhere"}, "'nowhere' does not exist"),
    ):
        with pytest.raises(MedheadError, match=says) as refusal:
            build_proposer("ngram", target, **options)
        assert "\n" not in str(refusal.value)


def test_the_work_of_a_step_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 tokens, half of them a loop: a tree reads few states, each with few followers, and a token adds two at most."""
    generator = torch.Generator().manual_seed(1)
    varied = (torch.rand(50_000, generator=generator) ** 3 * 2000).long().tolist()
    text = varied + [7, 8, 9, 10, 7, 8] * 5000 + varied[:20_000]
    memory = TextMemory(16, 10, 4096)
    memory.trie(text, 16, 10, 0.02)
    followers: list[int] = []
    after = SuffixAutomaton.after

    def counted(self: SuffixAutomaton, state: int) -> list[tuple[int, int, float]]:
        found = after(self, state)
        followers.append(len(found))
        return found

    monkeypatch.setattr(SuffixAutomaton, "after", counted)
    for token in varied[20_000:20_200]:
        text.append(token)
        followers.clear()
        memory.trie(text, 16, 10, 0.02)
        assert len(followers) <= 16 * (16 + 10)
        assert max(followers, default=0) <= memory.automaton.followers
    assert len(memory.automaton.length) <= 2 * len(text)


# -------------------------------------------------------------------- candidates

PATHS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.floats(0.01, 1)), max_size=8)


def trie(paths: list[tuple[list[int], float]]) -> DraftTrie:
    made = DraftTrie(9)
    for path, prob in paths:
        node = 0
        for token in path:
            node = made.add(node, token, prob)
    return made


@given(PATHS, PATHS, st.integers(1, 12))
def test_merged_and_cut_candidates_are_trees(one: list, other: list, nodes: int) -> None:
    first, second = trie(one), trie(other)
    alone, added = trie_paths(first), trie_paths(second)
    first.merge(second)
    merged = trie_paths(first)
    assert set(merged) == set(alone) | set(added)
    for path, prob in merged.items():
        assert prob == pytest.approx(1 - (1 - alone.get(path, 0)) * (1 - added.get(path, 0)))
        assert prob <= merged.get(path[:-1], 1.0)
    few = trie_paths(first.prune(nodes))
    assert len(few) == min(nodes - 1, len(merged))
    assert all(path[:-1] in few for path in few if len(path) > 1)
    assert sum(few.values()) == pytest.approx(sum(sorted(merged.values(), reverse=True)[: nodes - 1]))
    tree = to_token_tree([first, DraftTrie(9)], torch.tensor([9, 9]))
    assert torch.equal(TokenTree.from_parents(tree.tokens, tree.parents).depth, tree.depth)
    grown = [{tuple(path[:n]) for path in tree.paths(row) for n in range(1, len(path) + 1)} for row in (0, 1)]
    assert grown == [set(merged), {(9,)} if merged else set()]  # the second row is padded with its root
