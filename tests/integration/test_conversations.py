"""Prompts that begin like earlier texts: the same texts as without a prefix cache, with less to read."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from conftest import noise_heads, tiny_llama
from families import ACCEPTED, HAS_5_24, exists, tiny, tiny_stateful
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.core.joining import Joining, StoredPrefix
from medhead.core.sequence import Sequence
from medhead.core.stopping import StopChecker
from medhead.core.tree import TokenTree
from medhead.model.target import Target
from medhead.proposers import build_proposer
from medhead.proposers.base import DecodeState, Proposer
from medhead.serving import Engine, Request

TINY = 20_000  # bytes: 39 tokens of `tiny_llama`
KINDS = ["none", "ngram", "recycling", "lookahead", "recurrent", "attention", "block", "hybrid"]


def make_decoder(kind: str, target: Target, step: str = "loop") -> Decoder:
    """A decoder with a proposer, or with heads, by name; `hybrid` has heads that look back at the text."""
    if kind in ("none", "ngram", "recycling", "lookahead"):
        return Decoder(target, kind, step=step)
    heads = noise_heads(target, {"block": "block_recurrent", "hybrid": "attention"}.get(kind, kind))
    return Decoder(target, "hybrid" if kind == "hybrid" else "heads", heads=heads, tree_size=8, step=step)


@pytest.fixture(scope="module")
def small() -> Target:
    model = tiny_llama(context=320, eos_token_id=None)
    return Target(model, probe=False)


def tokens_of(handle: Any) -> list[int]:
    return [token for output in handle for token in output.tokens]


def talk(engine: Engine, seed: int, rounds: int = 4, vocab: int = 64) -> list[list[int]]:
    """Texts of requests that arrive together; each goes on from a random place of an earlier text, or begins anew."""
    draw, texts = random.Random(seed), list[list[int]]()
    for _ in range(rounds):
        asked = []
        for _ in range(draw.randint(1, 4)):
            before = draw.choice(texts) if texts and draw.random() < 0.8 else []
            whole = draw.random() < 0.5
            kept = before if whole else before[: draw.randint(0, len(before))]
            prompt = kept[:240] + [draw.randrange(3, vocab) for _ in range(draw.randint(1, 30))]
            temperature, limit = draw.choice([0.0, 0.8]), draw.randint(1, 20)
            params = SamplingParams(limit, temperature=temperature, seed=draw.randrange(100) if temperature else None)
            asked.append(Request(prompt, params))
        lost = None
        if draw.random() < 0.5:  # is cancelled while it runs
            base = draw.choice(texts) if texts else [5, 6, 7]
            lost = engine.submit(Request([*base[:200], 9, 8], SamplingParams(60)))
            next(iter(lost))
        handles = [engine.submit(request) for request in asked]
        if lost is not None:
            lost.cancel()
        texts += [request.prompt + tokens_of(handle) for request, handle in zip(asked, handles, strict=True)]
    return texts


@pytest.mark.parametrize(
    ("kind", "limit", "seed"),
    [*((kind, None, 1) for kind in KINDS), *((kind, TINY, 2) for kind in ("none", "attention", "hybrid"))],
)
def test_conversations_with_forks_have_the_texts_without_a_cache(small, tokenizer, kind, limit, seed):
    found, options = {}, {"max_rows": 3, "prefill_chunk": 16}
    for used in (0, limit):
        with Engine(make_decoder(kind, small), tokenizer, prefix_cache_bytes=used, **options) as engine:
            found[used] = talk(engine, seed)
            totals = engine.statistics()
            assert (totals.prefix_hits > 0) == (used != 0)
            assert totals.prefix_hits < totals.prefix_queries
            assert totals.prefix_bytes <= (10**12 if used is None else used)
    assert found[0] == found[limit]


@pytest.mark.parametrize("lag", [0, 1])
def test_captured_steps_keep_their_texts_too(small, tokenizer, lag):
    found = []
    for limit in (0, None):
        decoder = make_decoder("attention", small, step="eager")
        decoder.graphs.lag = lag
        with Engine(decoder, tokenizer, max_rows=3, prefill_chunk=16, prefix_cache_bytes=limit) as engine:
            found.append(talk(engine, 3))
            assert (engine.statistics().prefix_hits > 0) == (limit is None)
        assert len(decoder.graphs) > 0
    assert found[0] == found[1]


def test_requests_with_other_proposers_use_the_same_rows(small, tokenizer):
    prompt = list(range(3, 50))
    with Engine(make_decoder("none", small), tokenizer) as engine:
        first = engine.submit(Request(prompt, SamplingParams(8), proposer="recycling"))
        text = prompt + tokens_of(first) + [9, 10]
        second = engine.submit(Request(text, SamplingParams(8), proposer="ngram"))
        second.wait()
        assert (first.result.cached_tokens, second.result.cached_tokens) == (0, len(text) - 3)
        assert engine.statistics().prefix_queries == len(prompt) + len(text)


def test_batches_that_read_other_layers_share_rows(small, tokenizer):
    """Entries of a draft cache are needed by its heads alone; the engine is idle between the requests."""
    prompt, cached = list(range(3, 40)), []
    with Engine(make_decoder("attention", small), tokenizer) as engine:
        for turn, proposer in enumerate(["none", None, "none", None, "ngram"]):
            handle = engine.submit(Request(prompt + [5] * turn, SamplingParams(1), proposer=proposer))
            handle.wait()
            while engine.target.lock.contended or engine.statistics().running:
                pass
            with engine.target.lock:
                cached.append(handle.result.cached_tokens)
    assert cached == [0, 0, 38, 37, 40]


@pytest.mark.parametrize(("kind", "again"), [("none", 1), ("recurrent", 1), ("attention", 2), ("block", 2)])
def test_ten_turns_read_only_what_is_new(small, tokenizer, kind, again):
    """But for the last token of the turn before, and one more where its entry of a draft cache depends on the next one."""
    text, read = [3, 4, 5], []
    with Engine(make_decoder(kind, small), tokenizer) as engine:
        for _ in range(10):
            handle = engine.submit(Request(text, SamplingParams(5)))
            text = [*text, *tokens_of(handle), 20, 21, 22]
            read.append(handle.result.prompt_tokens - handle.result.cached_tokens)
    assert read == [3] + [3 + again] * 9


def prefix_of(target: Target, proposer: Any, text: list[int], length: int) -> StoredPrefix:
    """The first tokens of a text, as a request that goes on differently leaves them."""
    other = [*text[: length + 1], 1, 2, 3]
    read = joined(target, proposer, other, None)
    drafts = [] if read.draft_cache is None else read.draft_cache.copy_tokens(0, 0, length)
    return StoredPrefix(length, read.cache.copy_tokens(0, 0, length), drafts)


def joined(target: Target, proposer: Any, text: list[int], prefix: StoredPrefix | None) -> Joining:
    sequence = Sequence(list(text), list(text), StopChecker(4))
    joining = Joining(target, proposer, [sequence], None if prefix is None else [prefix])
    while joining.left:
        joining.advance(7)
    return joining


@pytest.mark.parametrize("kind", ["recurrent", "attention", "block_recurrent", "block_full"])
def test_a_draft_cache_that_is_continued_is_the_one_of_a_prompt_that_is_read(small, kind):
    proposer = build_proposer("heads", small, heads=noise_heads(small, kind))
    check_continued(small, proposer)


def check_continued(target: Target, proposer: Any) -> None:
    text = [3 + (7 * at) % 20 for at in range(40)]
    with torch.inference_mode(), target.active(proposer.feature_layers):
        whole = joined(target, proposer, text, None)
        again = joined(target, proposer, text, prefix_of(target, proposer, text, 17))
        for one, other in zip(whole.cache.copy_tokens(0, 0, 39), again.cache.copy_tokens(0, 0, 39), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        if whole.draft_cache is not None:
            pairs = zip(*(one.draft_cache.copy_tokens(0, 0, 39) for one in (whole, again)), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        for part, other in zip(whole.read, again.read, strict=True):
            torch.testing.assert_close(part, other, atol=1e-4, rtol=1e-4)


def test_a_long_prompt_is_read_between_steps(small, tokenizer, monkeypatch):
    """Between two chunks of one prompt the running request makes a step, and a short prompt passes the long one."""
    order: list[tuple[str, int]] = []

    def recorded(name: str) -> Callable[..., Any]:
        own = getattr(small, name)

        def run(cache: Any, nodes: Any, *rest: Any) -> Any:
            order.append((name, nodes.shape[1] if name == "read_chunk" else 1))
            return own(cache, nodes, *rest)

        return run

    long = Request([3 + at % 50 for at in range(200)], SamplingParams(4))
    with Engine(make_decoder("none", small), tokenizer, prefill_chunk=16) as engine:
        running = engine.submit(Request([5, 6, 7], SamplingParams(250)))
        next(iter(running))
        for name in ("read_chunk", "verify"):
            monkeypatch.setattr(small, name, recorded(name))
        handles = [engine.submit(long), engine.submit(Request([9, 8, 7, 6], SamplingParams(2)))]
        for handle in handles:
            handle.wait()
        running.cancel()
    names = [name for name, _ in order]
    assert max(size for name, size in order if name == "read_chunk") == 16
    assert not any(pair == ("read_chunk", "read_chunk") for pair in pairwise(names))
    assert names.count("read_chunk") == 13 + 1
    assert handles[1].result.seconds < handles[0].result.first_token


def test_a_prompt_that_is_given_up_is_not_read_on(small, tokenizer, monkeypatch):
    read, own = [], small.read_chunk
    with Engine(make_decoder("none", small), tokenizer, prefill_chunk=8) as engine:
        running = engine.submit(Request([5, 6, 7], SamplingParams(250)))
        next(iter(running))
        lost: list[Any] = []

        def read_chunk(*given: Any) -> Any:
            read.append(given)
            if len(read) == 3:
                lost[0].cancel()
            return own(*given)

        monkeypatch.setattr(small, "read_chunk", read_chunk)
        prompt = [3 + at % 50 for at in range(200)]
        lost.append(engine.submit(Request(prompt, SamplingParams(4))))
        assert lost[0].wait() == ""
        assert (lost[0].result.reason, len(read)) == ("cancelled", 3)
        again = engine.submit(Request(prompt, SamplingParams(4)))  # goes on where the first one was given up
        again.wait()
        assert again.result.cached_tokens == 24
        running.cancel()


def test_other_weights_make_other_texts(tokenizer):
    model = tiny_llama(seed=5, context=320, eos_token_id=None)
    prompt = list(range(3, 60))
    with Engine(Decoder(model, "none"), tokenizer) as engine:
        before = tokens_of(engine.submit(Request(prompt, SamplingParams(12))))
        while engine.target.lock.contended or engine.statistics().running:
            pass
        with engine.target.lock:
            model.load_state_dict(tiny_llama(seed=6, context=320).state_dict())
        handle = engine.submit(Request(prompt, SamplingParams(12)))
        after = tokens_of(handle)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert after == expected != before
    assert handle.result.cached_tokens == 0


@pytest.mark.skipif(not HAS_5_24, reason="needs transformers 5.24")
@pytest.mark.parametrize(("family", "reuses"), [("qwen3_5_text", True), ("lfm2", True), ("mamba", False)])
def test_states_are_kept_at_the_ends_of_prompts(tokenizer, family, reuses):
    model = tiny_stateful(family)
    model.generation_config.eos_token_id = None
    target, texts = Target(model, probe=False), {}
    for limit in (0, None):
        with Engine(Decoder(target, "recycling"), tokenizer, max_rows=2, prefix_cache_bytes=limit) as engine:
            texts[limit] = talk(engine, 4, vocab=90)
            assert (engine.statistics().prefix_hits > 0) == (reuses and limit is None)
    assert texts[0] == texts[None]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt2", "deepseek_v3", "bloom"])
def test_windows_and_other_caches(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    if not exists(family):
        pytest.skip(f"this version of transformers has no {family}")
    model = tiny(family, ACCEPTED[family])
    model.generation_config.eos_token_id = None
    target, texts = Target(model, probe=False), {}
    for limit in (0, None):
        options = {"max_rows": 3, "prefill_chunk": 8, "prefix_cache_bytes": limit}
        with Engine(Decoder(target, "recycling"), tokenizer, **options) as engine:
            texts[limit] = talk(engine, 5, rounds=3, vocab=90)
    assert texts[0] == texts[None]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_texts_whose_rotary_frequencies_change_with_their_length_are_read_anew(tokenizer, kind):
    """The rows of a text of up to 40 tokens serve prompts of up to 40 tokens alone."""
    own = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 40, **own}
    model = tiny_llama(context=320 if kind == "longrope" else 40, rope_parameters=rope, eos_token_id=None)
    target, prompt = Target(model, probe=False), [3 + at % 50 for at in range(60)]
    target.context = 320
    texts: dict[int | None, list[list[int]]] = {}
    for limit in (0, None):
        with Engine(Decoder(target, "ngram"), tokenizer, max_rows=3, prefix_cache_bytes=limit) as engine:
            handles = []
            for tokens in (30, 35, 38, 41, 60, 60):
                handles.append(engine.submit(Request(prompt[:tokens], SamplingParams(4))))
                handles[-1].wait()
            texts[limit] = talk(engine, 6)
    assert [handle.result.cached_tokens for handle in handles] == [0, 30, 35, 0, 0, 0]
    assert texts[0] == texts[None]


class Replay(Proposer):
    """Proposes how a known text goes on, as a chain; for one sequence at a time."""

    name, max_depth, text = "replay", 6, list[int]()

    def propose(self, state: DecodeState, max_depth: int) -> TokenTree:
        end = len(state.texts[0])
        known = self.text[end : end + min(max_depth, self.max_depth)] if self.text[:end] == state.texts[0] else []
        tokens = torch.tensor([[state.texts[0][-1], *known]])
        return TokenTree.from_parents(tokens, (torch.arange(len(known) + 1) - 1).clamp(min=0))


@pytest.mark.skipif(not HAS_5_24, reason="needs transformers 5.24")
def test_the_states_of_an_answer_that_ends_inside_of_a_tree_are_not_kept(tokenizer):
    """They are those after the accepted tokens, of which a stop token cuts the last ones off."""
    model = tiny_stateful("lfm2")
    model.generation_config.eos_token_id = None
    target, prompt = Target(model, probe=False), [5, 9, 13, 5, 9, 20, 21]
    found: dict[int | None, list[list[int]]] = {}
    for limit in (0, None):
        proposer = Replay()
        with Engine(Decoder(target, proposer), tokenizer, prefix_cache_bytes=limit) as engine:
            whole = tokens_of(engine.submit(Request(prompt, SamplingParams(16))))
            proposer.text, found[limit] = prompt + whole, []
            for end in range(1, 12):
                cut = engine.submit(Request(prompt, SamplingParams(16, stop_token_ids=(whole[end],))))
                text = prompt + tokens_of(cut)
                found[limit].append(tokens_of(engine.submit(Request([*text, 8, 7], SamplingParams(8)))))
    assert found[0] == found[None]
