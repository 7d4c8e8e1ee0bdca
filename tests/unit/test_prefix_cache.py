"""The prefix cache against its definition: what it returns is what reading the prompt would give."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medhead.serving.prefix_cache import BLOCK, PrefixCache

KEY = "heads"
# few tokens, so that texts share beginnings, and long enough for several blocks
TOKENS = st.lists(st.integers(0, 1), min_size=0, max_size=4)


def rows_of(text: list[int], ahead: int = 0) -> Tensor:
    """A number for every token that depends on all tokens up to it and `ahead` more, `[1, tokens, 1]`."""
    ids = [hash(tuple(text[: at + 1 + ahead])) % 2**40 for at in range(len(text) - ahead)]
    return torch.tensor(ids, dtype=torch.float64).view(1, -1, 1)


def store(cache: PrefixCache, text: list[int], with_drafts: bool = True, with_states: bool = False) -> None:
    """Keep all but the last token of a text, as the engine does."""
    rows, drafts = rows_of(text), rows_of(text, 1)
    states = {"state": rows[0, -2].clone()} if with_states else None
    copy_drafts = (lambda begin, end: [drafts[:, begin:end].clone()]) if with_drafts else None
    cache.store(text[:-1], lambda begin, end: [rows[:, begin:end].clone()], KEY, copy_drafts, states)


def common(first: list[int], second: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 10**9)


def texts_of(plans: list[tuple[int, int, int, list[int]]]) -> list[list[int]]:
    """Texts that begin like earlier ones: which one, how many of its tokens, then a run of tokens and some others."""
    texts: list[list[int]] = [[7] * 3]
    for which, cut, run, tail in plans:
        texts.append([*texts[which % len(texts)][:cut], *[5] * run, *tail, 3, 4])
    return texts[1:]


PLANS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200), st.integers(0, 150), TOKENS), min_size=1, max_size=8)


@given(PLANS, st.booleans())
def test_the_longest_known_beginning_is_found_and_right(plans, with_drafts) -> None:
    cache, seen = PrefixCache(1 << 30), list[list[int]]()
    for text in texts_of(plans):
        found = cache.find(text, KEY if with_drafts else None)
        longest = max((min(common(text, one), len(one) - 1, len(text) - 1) for one in seen), default=0)
        assert found.length == max(0, longest - with_drafts)
        if found.length:
            assert torch.equal(found.rows[0], rows_of(text)[:, : found.length])
        if found.length and with_drafts:
            assert torch.equal(found.drafts[0], rows_of(text, 1)[:, : found.length])
        store(cache, text)
        seen.append(text)


@given(PLANS, st.integers(0, 6 * BLOCK * 16), st.lists(st.booleans(), min_size=8, max_size=8))
def test_it_stays_below_its_limit_and_right(plans, limit, with_drafts) -> None:
    cache = PrefixCache(limit)
    for text, drafted in zip(texts_of(plans), with_drafts, strict=False):
        for key in (None, KEY):
            found = cache.find(text, key)
            if found.length:
                assert torch.equal(found.rows[0], rows_of(text)[:, : found.length])
            if found.length and key is not None:
                assert torch.equal(found.drafts[0], rows_of(text, 1)[:, : found.length])
        store(cache, text, drafted)
        assert 0 <= cache.nbytes <= limit
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


@given(PLANS)
def test_states_are_those_of_the_end_of_the_prefix(plans) -> None:
    cache, seen = PrefixCache(1 << 30, has_states=True), list[list[int]]()
    for text in texts_of(plans):
        found = cache.find(text)
        known = [len(one) - 1 for one in seen if len(one) <= len(text) and common(text, one) >= len(one) - 1]
        assert found.length <= max(known, default=0)
        if found.length:
            assert found.length in known
            assert torch.equal(found.states["state"], rows_of(text)[0, found.length - 1])
            assert torch.equal(found.rows[0], rows_of(text)[:, : found.length])
        store(cache, text, with_states=True)
        seen.append(text)


def test_texts_of_another_salt_are_not_found_and_nothing_is_left_of_them() -> None:
    text, rows = list(range(100)), rows_of(list(range(100)))
    cache, parts = PrefixCache(1 << 20), list[Callable[[], Tensor | None]]()

    def copy_rows(begin: int, end: int) -> list[Tensor]:
        copied = rows[:, begin:end].clone()
        parts.append(weakref.ref(copied))
        return [copied]

    cache.store(text, copy_rows, salt="mine")
    found = {salt: cache.find(text, salt=salt).length for salt in (None, "mine", "other")}
    assert found == {None: 0, "mine": 99, "other": 0}
    cache.clear()
    assert [part() for part in parts] == [None] * 2  # at once, without a garbage collection
    assert cache.find(text, salt="mine").length == 0


def test_what_was_used_last_is_kept() -> None:
    texts = [[first] * 65 for first in range(4)]
    cache = PrefixCache(3 * BLOCK * 8)  # three blocks of numbers of 8 bytes
    for text in texts[:3]:
        store(cache, text, with_drafts=False)
    cache.find(texts[0])
    store(cache, texts[3], with_drafts=False)
    assert [cache.find(text).length for text in texts] == [64, 0, 64, 64]


def test_of_a_text_that_is_too_large_the_beginning_is_kept() -> None:
    text = list(range(400))
    cache = PrefixCache(2 * BLOCK * 8)
    store(cache, [9] * 100, with_drafts=False)
    store(cache, text, with_drafts=False)
    assert cache.find(text).length == 2 * BLOCK


@settings(max_examples=10)
@given(st.integers(1, 300))
def test_a_conversation_is_known_but_for_what_is_new(length: int) -> None:
    cache, text = PrefixCache(1 << 30), [1] * length
    for turn in range(5):
        store(cache, text)
        longer = [*text, *range(10 + turn, 20 + turn)]
        assert cache.find(longer).length == len(text) - 1
        assert cache.find(longer, KEY).length == max(0, len(text) - 2)
        text = longer
