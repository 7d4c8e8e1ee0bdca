"""The suffix automaton against a search through the text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medhead.proposers.automaton import ROOT, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def ends(text: list[int], part: list[int]) -> list[int]:
    """Where a part ends in a text: positions of its last tokens."""
    n = len(part)
    return [end for end in range(n - 1, len(text)) if text[end - n + 1 : end + 1] == part]


def built(text: list[int], bound: int, half_life: float = 7.0, followers: int = 8) -> SuffixAutomaton:
    automaton = SuffixAutomaton(bound, half_life, followers)
    for token in text:
        automaton.append(token)
    return automaton


def state_of(automaton: SuffixAutomaton, part: list[int]) -> int | None:
    """Walk along a part; the automaton must return all followers."""
    state: int | None = ROOT
    for token in part:
        following = {} if state is None else {name: reached for name, reached, _ in automaton.after(state)}
        state = following.get(token)
    return state


@given(TEXTS, st.integers(2, 9), st.floats(1, 50))
def test_weights_of_all_substrings(text: list[int], bound: int, half_life: float) -> None:
    automaton = built(text, bound, half_life)
    for start in range(len(text)):
        for end in range(start + 1, min(len(text), start + bound) + 1):
            part = text[start:end]
            state = state_of(automaton, part)
            assert state is not None
            expected = sum(0.5 ** ((len(text) - 1 - at) / half_life) for at in ends(text, part))
            assert automaton.weight(state) == pytest.approx(expected)
    assert state_of(automaton, [*text, 0]) is None


def check_followers(text: list[int], bound: int, kept: int, longest: int) -> None:
    """The followers of every substring of at most `longest` tokens; states do not depend on how many are kept."""
    automaton, complete = built(text, bound, 7.0, kept), built(text, bound, 7.0, len(text))
    for length in range(1, longest + 1):
        for start in range(len(text) - length):
            part = text[start : start + length]
            weights = {
                token: sum(0.5 ** ((len(text) - 1 - at) / 7.0) for at in ends(text, [*part, token]))
                for token in set(text)
                if ends(text, [*part, token])
            }
            state = state_of(complete, part)
            assert state is not None
            named = automaton.after(state)
            best = sorted(weights, key=lambda token: -weights[token])
            if len(best) > kept:
                best = best[:kept]
            assert [token for token, _, _ in named] == best
            assert [weight for _, _, weight in named] == pytest.approx([weights[token] for token in best])


@given(TEXTS, st.integers(2, 9), st.integers(1, 4))
def test_followers_are_the_heaviest(text: list[int], bound: int, kept: int) -> None:
    check_followers(text, bound, kept, min(bound, len(text)) - 1)


@pytest.mark.parametrize("kept", [3, 4, 7])
def test_followers_of_a_varied_text(kept: int) -> None:
    generator = random.Random(kept)
    check_followers([generator.randrange(8) for _ in range(200)], 5, kept, 1)


@given(TEXTS, st.integers(2, 9))
def test_no_more_than_the_bound_is_counted(text: list[int], bound: int) -> None:
    """The state from which occurrences are counted is that of the last `bound - 1` tokens, so it is at most `bound` steps."""
    automaton = SuffixAutomaton(bound, 7.0)
    for size, token in enumerate(text, 1):
        automaton.append(token)
        recent = automaton.recent
        assert automaton.length[automaton.link[recent]] < min(size, bound - 1) <= automaton.length[recent]


@given(TEXTS, st.integers(2, 9), st.integers(1, 12))
def test_suffixes_that_occur_earlier(text: list[int], bound: int, longest: int) -> None:
    """One for every set of places, the longest of it, while its length is below `bound`."""
    found = [length for _, length in built(text, bound).suffixes(longest)]
    by_places: dict[tuple[int, ...], int] = {}
    for length in range(1, min(longest, bound - 1, len(text)) + 1):
        places = tuple(ends(text, text[-length:]))
        if len(places) > 1:
            by_places[places] = length
    assert found == sorted(by_places.values(), reverse=True)


def test_weights_survive_being_scaled_down() -> None:
    generator = random.Random(3)
    text = [generator.randrange(5) for _ in range(1500)]
    automaton = built(text, 4, half_life=1.0)  # 2 ** 1500 is no float
    for part in ([1], [2, 3], [4, 4, 1], text[-3:]):
        state = state_of(automaton, part)
        assert state is not None
        expected = sum(0.5 ** (len(text) - 1 - at) for at in ends(text, part))
        assert automaton.weight(state) == pytest.approx(expected, abs=1e-12)
        named = automaton.after(state)
        assert [weight for _, _, weight in named] == sorted((weight for _, _, weight in named), reverse=True)


def test_an_empty_text_has_no_suffix() -> None:
    assert list(SuffixAutomaton(4, 8.0).suffixes(3)) == []
    assert list(built([5], 4).suffixes(3)) == []
