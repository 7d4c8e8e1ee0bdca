"""Lookahead decoding against the paper's loop, written out without a tree, a mask or a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from conftest import tiny_llama
from medhead import Decoder, MedheadError, TokenTree
from medhead.core.gumbel import GumbelNoise
from medhead.core.sequence import Sequence
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.proposers.lookahead import LookaheadProposer, Pool, Window
from medhead.proposers.lookahead_sizes import nodes_needed
from scripted import trie_paths

Grams = dict[int, list[tuple[int, ...]]]
SEED = 5
PROMPTS = [[5, 9, 13, 5, 9], [7], [20, 21, 22, 23, 24, 25, 26, 27, 28]]


def content(pool: Pool) -> Grams:
    return {token: grams for token in range(64) if (grams := pool.after(token))}


class Model:
    """Returns the model's next token, one text at a time."""

    def __init__(self, model: PreTrainedModel, noise: GumbelNoise | None, row: int, temperature: float) -> None:
        self.model, self.noise, self.row, self.temperature = model, noise, row, temperature
        self.known: dict[tuple[int, ...], int] = {}

    def __call__(self, text: list[int]) -> int:
        key = tuple(text)
        if key not in self.known:
            logits = self.model(torch.tensor([text]), use_cache=False).logits[0, -1]
            if self.noise is not None:
                logits = logits / self.temperature
                where = torch.tensor([[SEED, 0]]), torch.tensor([self.row]), torch.tensor([[len(text)]])
                logits = logits + self.noise.gumbel(*where)[0, 0]
            self.known[key] = int(logits.argmax())
        return self.known[key]


def papers_loop(
    say: Model, prompt: list[int], first: list[int], sizes: tuple[int, int, int], new: int, padded: list[bool]
) -> tuple[list[list[int]], list[Grams]]:
    """Tokens of every pass, and the pool after it.

    The paper verifies the pool's n-grams alone; here a column of the window that happens to be right counts as well, and
    in passes where a row was padded (`padded`), so does its root said again.
    """
    width, n, kept = sizes
    text, known = list(prompt), 0
    pool: Grams = {}
    levels = [list(first)]
    passes, pools = [], []

    def remember(gram: tuple[int, ...]) -> None:
        entries = pool.setdefault(gram[0], [])
        if gram[1:] in entries:
            entries.remove(gram[1:])
        entries.insert(0, gram[1:])
        del entries[kept:]

    def read() -> None:
        nonlocal known
        for start in range(known, len(text) - n + 1):
            remember(tuple(text[start : start + n]))
        known = max(0, len(text) - n + 1)

    def emit(fresh: list[int]) -> None:
        text.extend(fresh)
        passes.append(fresh)
        pools.append({key: list(grams) for key, grams in pool.items()})

    read()
    emit([say(text)])  # by the pass over the prompt
    while len(text) - len(prompt) < new:
        read()
        # the columns of the window, from the root to the last level: level 0 is a chain, then straight up
        columns = []
        for column in range(len(levels[0]) + 1):
            columns.append(levels[0][:column] + [level[column] for level in levels[1:]])
        drafts = [list(gram) for gram in pool.get(text[-1], [])]
        # verify: the longest beginning of an n-gram (or column) that the model generates itself, and one token more
        drafts += [[text[-1]]] if padded[len(passes) - 1] else []
        fresh = [say(text)]
        while any(path[: len(fresh)] == fresh for path in drafts + columns):
            fresh.append(say(text + fresh))
        # look ahead: what comes behind every column
        answers = [say(text + column) for column in columns]
        if len(levels) == n - 1:
            for column, answer in enumerate(answers):
                key = text[-1] if column == 0 else levels[0][column - 1]
                remember((key, *(level[column] for level in levels[1:]), answer))
            levels = [*levels[1:], answers]
            levels[0] = levels[0][1:]
        else:
            levels = [level[1:] for level in [*levels, answers]]
        emit(fresh)
        assert width <= len(answers)
    return passes, pools


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (5, 3, 4), (1, 4, 3), (4, 2, 2), (2, 5, 1)])
@torch.inference_mode()
def test_same_pool_and_same_accepted_tokens(sizes: tuple[int, int, int], sample: bool) -> None:
    """Three rows of different length at once, each against the loop on its own."""
    model = tiny_llama(eos_token_id=None, initializer_range=0.4)
    width, n, kept = sizes
    proposer = LookaheadProposer(None, window=width, ngram=n, guess_set=kept)
    decoder = Decoder(model, proposer)
    passes: list[list[list[int]]] = [[] for _ in PROMPTS]
    pools: list[list[Grams]] = [[] for _ in PROMPTS]
    held: list[Pool] = []

    def record(row: Sequence, new: list[int]) -> None:
        held.extend(row.pool for row in proposer.row_states[len(held) :])  # rows that have ended leave the list
        passes[row.index].append(new)
        pools[row.index].append(content(held[row.index]))

    padded: list[list[bool]] = [[] for _ in PROMPTS]
    verify = decoder.target.verify

    def look(cache: Any, tree: TokenTree) -> Any:
        for row, (tokens, parents) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
            padded[row].append((tokens[0], 0) in list(zip(tokens, parents, strict=True))[1:])
        return verify(cache, tree)

    decoder.target.verify = look  # type: ignore[method-assign]
    decoder.on_pass = record
    size = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (size - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (size - len(p)) + [1] * len(p) for p in PROMPTS])
    how: dict[str, Any] = (
        {"do_sample": True, "top_k": 0, "temperature": 0.6, "seed": SEED} if sample else {"do_sample": False}
    )
    decoder.generate(ids, attention_mask=mask, max_new_tokens=70, **how)
    noise = GumbelNoise(64) if sample else None
    accepted = 0
    for row, prompt in enumerate(PROMPTS):
        expected = papers_loop(
            Model(model, noise, row, 0.6), prompt, proposer.first_level(prompt), sizes, 45, padded[row]
        )
        count = len(expected[0])
        assert passes[row][:count] == expected[0]
        assert pools[row][:count] == expected[1]
        assert count > n  # the window was filled and went on
        accepted += sum(map(len, expected[0])) - count
    assert accepted > 0


@torch.inference_mode()
def test_what_the_window_wrote_is_accepted() -> None:
    """A model that goes in circles: without the window nothing of the prompt would help."""
    model = tiny_llama(eos_token_id=None, initializer_range=0.25, seed=1)
    decoder = Decoder(model, "lookahead")
    ids = torch.tensor([[5, 9, 13]])
    found = decoder.generate(ids, max_new_tokens=100, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=100, do_sample=False))
    assert decoder.statistics.accepted_length > 1.3


def tree_of(proposer: LookaheadProposer, text: list[int], max_depth: int = 99) -> Any:
    from test_ngram import state

    target: Any = None
    return proposer.propose(state(target, [text]), max_depth)


def test_the_tree_is_the_papers_mask() -> None:
    """Level 0 is a chain; every other node is above its column; n-grams hang on the root."""
    proposer = LookaheadProposer(None, window=3, ngram=4, guess_set=2)
    text = [50, 51, 52, 53, 60, 50]
    proposer.begin(None, [text])  # type: ignore[arg-type]
    window = proposer.row_states[0].window
    window.levels = [[1, 2], [10, 11, 12], [20, 21, 22]]
    tree = tree_of(proposer, text)
    paths = {tuple(path) for path in tree.paths(0)}
    assert paths == {(10, 20), (1, 11, 21), (1, 2, 12, 22), (51, 52, 53)}
    last = [tree.tokens[0, node].item() for node in proposer.row_states[0].last_level]
    assert last == [20, 21, 22]
    assert window.advance(50, [30, 31, 32]) == [(50, 10, 20, 30), (1, 11, 21, 31), (2, 12, 22, 32)]
    assert window.levels == [[11, 12], [20, 21, 22], [30, 31, 32]]


def test_near_the_end_the_window_waits() -> None:
    proposer = LookaheadProposer(None, window=3, ngram=4, guess_set=2)
    text = [50, 51, 52, 53, 60, 50]
    proposer.begin(None, [text])  # type: ignore[arg-type]
    assert proposer.max_depth == 4
    assert {tuple(p) for p in tree_of(proposer, text, 2).paths(0)} == {(51, 52)}
    assert proposer.row_states[0].last_level == []
    assert tree_of(proposer, text, 0).nodes == 1
    assert len(tree_of(proposer, text, 4).paths(0)) == 2


@pytest.mark.parametrize("sizes", [(1, 2, 1), (5, 4, 5), (2, 6, 3), (9, 3, 1), (1, 8, 2)])
def test_no_tree_is_larger_than_it_says(sizes: tuple[int, int, int]) -> None:
    width, n, kept = sizes
    proposer = LookaheadProposer(None, window=width, ngram=n, guess_set=kept)
    text = [7, *range(100, 100 + n), *([7, *range(200, 200 + n)] * kept), 7]
    for row in range(kept):
        text += [7, *range(300 + 20 * row, 300 + 20 * row + n)]
    text += [7]
    proposer.begin(None, [text])  # type: ignore[arg-type]
    assert proposer.tree_size == nodes_needed(*sizes)
    sizes_seen, fresh = [], iter(range(1000, 9000))
    proposer.row_states[0].window.levels = [[next(fresh) for _ in proposer.row_states[0].window.levels[0]]]
    for _ in range(n + 1):
        tree = tree_of(proposer, text)
        sizes_seen.append(tree.nodes)
        assert tree.max_depth <= proposer.max_depth
        proposer.row_states[0].window.advance(7, [next(fresh) for _ in proposer.row_states[0].last_level])
    assert max(sizes_seen) == proposer.tree_size


def test_a_pool_forgets_what_was_seen_longest_ago() -> None:
    pool = Pool(2)
    for gram in ((1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7), (2, 8, 9)):
        pool.add(gram)
    assert content(pool) == {1: [(6, 7), (2, 3)], 2: [(8, 9)]}
    assert pool.after(9) == []


def test_the_first_passes_fill_the_window() -> None:
    window = Window(3, [[1, 2, 3]])
    assert window.advance(0, [10, 11, 12, 13]) == []
    assert window.levels == [[2, 3], [11, 12, 13]]
    assert window.advance(0, [21, 22, 23]) == []
    assert window.levels == [[3], [12, 13], [22, 23]]
    assert window.advance(9, [30, 31]) == [(9, 12, 22, 30), (3, 13, 23, 31)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 16, 30, 64, 256])
def test_any_tree_size_can_be_asked_for(model: PreTrainedModel, target: Target, size: int) -> None:
    proposer = LookaheadProposer(target, tree_size=size)
    assert proposer.tree_size <= size
    assert proposer.tree_size >= min(size, 2)
    assert proposer.tree_size > size // 2
    if size in (1, 7):
        ids = torch.tensor([[5, 9, 13]])
        found = Decoder(model, proposer).generate(ids, max_new_tokens=30, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=30, do_sample=False))


def test_candidates_are_the_pools_n_grams() -> None:
    from test_ngram import state

    target: Any = None
    proposer = LookaheadProposer(None, window=2, ngram=3, guess_set=2)
    text = [5, 1, 2, 5, 3, 4, 5]
    proposer.begin(None, [text])  # type: ignore[arg-type]
    found = trie_paths(proposer.tries(state(target, [text]), 9)[0])
    assert set(found) == {(3,), (3, 4), (1,), (1, 2)}
    assert 1 >= found[3,] > found[3, 4] > found[1, 2] > 0
    assert set(trie_paths(proposer.tries(state(target, [text]), 1)[0])) == {(3,), (1,)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, r"W \(window\) of at least 1, got 0"),
        ({"ngram": 1}, r"N \(ngram\) of at least 2, got 1"),
        ({"guess_set": -1}, r"G \(guess_set\) of at least 1"),
        ({"window": 2.5}, "whole number"),
        ({"window": 60, "ngram": 8, "guess_set": 60}, "W=60, N=8, G=60 needs 840 nodes, the tree has at most 256"),
        ({"window": 5, "ngram": 4, "guess_set": 5, "tree_size": 16}, "needs 30 nodes, the tree has at most 16"),
        ({"tree_size": 300}, "from 1 to 256"),
    ],
)
def test_wrong_sizes(target: Target, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MedheadError, match=says) as refusal:
        build_proposer("lookahead", target, **options)
    assert "\n" not in str(refusal.value)
