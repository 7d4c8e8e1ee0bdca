"""A grammar's state along the paths of a tree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, hf
from transformers import PreTrainedTokenizerBase

from medhead import Grammar
from medhead.core.constraint import Constraint, new_constraint
from medhead.grammar import compile_grammar

WORDS = Grammar.choice(["she went home", "she said: no", "dragon"])


@pytest.fixture
def encode(tokenizer: PreTrainedTokenizerBase) -> Any:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def constraint(tokenizer: Any, ends: tuple[int, ...] = (1,), grammar: Grammar = WORDS) -> Constraint:
    return new_constraint(grammar, tokenizer, len(tokenizer), ends)


def tokens_of(allowed: bytes | int) -> list[int]:
    if isinstance(allowed, int):
        return [allowed]
    return np.nonzero(np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little"))[0].tolist()


def chain(tokens: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and depth of one path below a root of token 0."""
    count = len(tokens)
    return [0, *tokens], [0, *range(count)], list(range(count + 1))


def test_forced_tokens_join_and_banned_ones_leave(tokenizer, encode) -> None:
    tokens, parents, depth = chain(encode("dragon"))
    kept, added = constraint(tokenizer).fit(tokens, parents, depth, 20)
    assert kept == list(range(len(tokens)))
    banned = 7
    assert tokenizer.decode([banned]) not in "sd"
    kept, added = constraint(tokenizer).fit([0, banned, tokens[1], banned], [0, 0, 0, 1], [0, 1, 1, 2], 20)
    assert kept == [0, 2]
    assert [token for token, _ in added] == tokens[2:]
    assert [parent for _, parent in added] == [2, *range(4, 3 + len(added))]


def test_no_node_is_too_deep_and_no_more_than_allowed_join(tokenizer) -> None:
    one = constraint(tokenizer, grammar=Grammar.choice(["she went home"]))
    for most in range(1, 6):
        kept, added = one.fit([0], [0], [0], most)
        assert (kept, len(added)) == ([0], most)


def test_every_end_token_is_allowed_where_a_text_is_complete(tokenizer, encode) -> None:
    one = constraint(tokenizer, ends=(1, 2), grammar=Grammar("regex", "dra(gon)?"))
    one.advance(encode("dragon"))
    assert tokens_of(one.allowed([0], [0])[0][1]) == [1, 2]
    one.advance([*encode("dragon"), 2])
    assert one.allowed([0, 5], [0, 0]) == []  # nothing is masked after the end
    assert one.fit([0, 5], [0, 0], [0, 1], 4) == ([0, 1], [])


class Failing:
    """A matcher that reaches its limits at one place and then stays in its state of error, as llguidance's does."""

    def __init__(self, matcher: LLMatcher, fails_after: list[int], text: list[int] | None = None) -> None:
        self.matcher, self.fails_after, self.text, self.failed = matcher, fails_after, list(text or []), False

    def deep_copy(self) -> Failing:
        return Failing(self.matcher.deep_copy(), self.fails_after, self.text)

    def is_error(self) -> bool:
        return self.failed

    def get_error(self) -> str:
        return "too complex"

    def compute_ff_tokens(self) -> list[int]:
        return [] if self.failed else self.matcher.compute_ff_tokens()

    def compute_bitmask(self) -> bytes:
        self.failed = self.failed or self.text == self.fails_after
        return bytes([2] + [0] * 40) if self.failed else self.matcher.compute_bitmask()

    def consume_tokens(self, tokens: list[int]) -> bool:
        return self.try_consume_tokens(tokens) == len(tokens)

    def try_consume_tokens(self, tokens: list[int]) -> int:
        count = 0 if self.failed else self.matcher.try_consume_tokens(tokens)
        self.text += tokens[:count]
        return count

    def rollback(self, count: int) -> bool:
        if not self.failed:
            del self.text[len(self.text) - count :]
        return not self.failed and self.matcher.rollback(count)


def test_a_path_that_is_too_complex_ends_and_changes_no_other(tokenizer, encode) -> None:
    grammar = Grammar("regex", "[a-z ]+")
    source, adapted = constraint(tokenizer, grammar=grammar), hf.from_tokenizer(tokenizer, eos_token=1)
    matcher = LLMatcher(adapted, compile_grammar(grammar.kind, grammar.text))
    first, second = encode("she"), encode("dragon")
    tokens = [0, *first, *second]
    parents = [0, 0, *range(1, len(first)), 0, *range(len(first) + 1, len(tokens) - 1)]
    whole = dict(source.allowed(tokens, parents))
    assert len(whole) == len(tokens)
    for fails_after, failing in (([], [0]), (first, [len(first)]), (first[:1], [1])):
        one = Constraint(Failing(matcher, fails_after), [1])  # type: ignore[arg-type]
        for _ in range(2):  # the second pass is as the first
            found = dict(one.allowed(tokens, parents))
            assert found.keys() == whole.keys()
            for node, allowed in found.items():
                assert tokens_of(allowed) == ([1] if node in failing else tokens_of(whole[node]))


def test_a_text_that_the_matcher_cannot_follow_ends(tokenizer, encode) -> None:
    one = constraint(tokenizer)
    one.advance(encode("no such text"))
    assert [tokens_of(allowed) for _, allowed in one.allowed([0, 5], [0, 0])] == [[1]]
    one.advance(encode("no such text at all"))
    assert one.fit([0, 5], [0, 0], [0, 1], 4) == ([0], [(1, 0)])
