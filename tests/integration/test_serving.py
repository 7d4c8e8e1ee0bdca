"""The engine: everybody gets exactly the text they would get alone."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
import torch

from medhead import Decoder
from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.model.kv_cache import TreeCache
from medhead.model.loading import DEMO_HEADS, DEMO_MODEL, load_model, load_tokenizer
from medhead.serving import Engine, EngineError, QueueFullError, Request, Stopped
from medhead.serving.detokenizer import Detokenizer

PROMPTS = [
    "Tell me a story about a dragon.",
    "Hello!",
    "I want to book a table for two at seven.",
    "What is the capital of France, and why do people like it so much?",
    "Once upon a time",
    "Can you help me find a hotel in the north?",
    "Sing a song.",
    "Tell me about a boy who lost his red ball in the garden behind the old house.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(load_model(DEMO_MODEL, torch.device("cpu"), torch.float32), heads=str(DEMO_HEADS))


@pytest.fixture
def engine(decoder, tokenizer):
    with Engine(decoder, tokenizer, heads=str(DEMO_HEADS), max_rows=8) as running:
        yield running


def alone(decoder: Decoder, request: Request) -> list[int]:
    """What plain decoding gives for a request by itself."""
    ids = torch.tensor([request.prompt])
    params = request.params
    options = {"do_sample": not params.greedy, "top_k": params.top_k or 0}
    if not params.greedy:
        options |= {"temperature": params.temperature, "seed": params.seed, "top_p": params.top_p or 1.0}
        options |= {"min_p": params.min_p} if params.min_p else {}
    with decoder.using("none"):
        out = decoder.generate(ids, max_new_tokens=params.max_new_tokens, **options)
    return out[0, len(request.prompt) :].tolist()


def request(prompt: list[int], proposer=None, tree_size=None, time_limit=None, trace=False, **params) -> Request:
    return Request(prompt, SamplingParams(**params), proposer, tree_size, time_limit, trace)


def requests(tokenizer, **options) -> list[Request]:
    made = []
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        sampled = {"temperature": 0.5 + 0.25 * (number % 3), "seed": 10 + number} if number % 2 else {}
        sampled |= {1: {"top_k": 40}, 3: {"top_p": 0.9}, 5: {"min_p": 0.05, "top_k": 7}}.get(number, {})
        made.append(request(list(ids), max_new_tokens=20 + 9 * number, **sampled, **options))
    return made


def tokens_of(handle) -> list[int]:
    return [token for output in handle for token in output.tokens]


@pytest.mark.parametrize("proposer", [None, "none", "ngram", "recycling", "lookahead", "heads"])
def test_mixed_requests_that_join_at_different_times_get_their_own_text(decoder, tokenizer, engine, proposer):
    asked = requests(tokenizer, proposer=proposer)
    handles = []
    for request in asked:
        handles.append(engine.submit(request))
        time.sleep(0.02)  # they join while others run
    found = [tokens_of(handle) for handle in handles]
    engine.close()
    assert found == [alone(decoder, request) for request in asked]
    assert [handle.result.new_tokens for handle in handles] == [len(text) for text in found]


def test_a_request_with_a_size_of_its_own_keeps_the_heads(decoder, tokenizer):
    asked = request(tokenizer("Once upon a time")["input_ids"], max_new_tokens=40, tree_size=16, trace=True)
    with Engine(decoder, tokenizer) as running:  # the heads are the decoder's
        outputs = list(running.submit(asked))
        named = request(asked.prompt, max_new_tokens=40, proposer="heads")
        assert running.submit(named).wait() == "".join(output.text for output in outputs)
    assert any("heads" in output.tree.sources for output in outputs if output.tree)


def test_a_handle_that_was_read_to_its_end_ends_for_everybody(tokenizer, engine):
    handle = engine.submit(request(prompt=tokenizer("Hello")["input_ids"], max_new_tokens=4))
    assert handle.wait()
    assert handle.wait() == ""  # every output is read once, but nobody waits for ever
    assert list(handle) == []
    assert asyncio.run(handle.finish()) == ""


def test_batchs_of_different_proposers_take_turns_and_stay_exact(decoder, tokenizer, engine):
    proposers = [None, "none", "ngram", "recycling", "lookahead", "heads", "hybrid", None]
    asked = [
        replace(one, proposer=name, tree_size=6 if name == "heads" else None)
        for one, name in zip(requests(tokenizer), proposers, strict=True)
    ]
    handles = [engine.submit(request) for request in asked]
    found = [tokens_of(handle) for handle in handles]
    engine.close()
    assert found == [alone(decoder, request) for request in asked]
    assert [handle.result.proposer for handle in handles] == ["hybrid", *proposers[1:7], "hybrid"]


@pytest.mark.parametrize("kind", ["heads-block", "heads-attention"])
def test_heads_that_remember_the_text_join_too(decoder, tokenizer, kind):
    folder = str(DEMO_HEADS.parent / kind)
    with Engine(Decoder(decoder.target, heads=folder), tokenizer, heads=folder, max_rows=3) as engine:
        asked = requests(tokenizer)[:6]
        handles = []
        for request in asked:
            handles.append(engine.submit(request))
            time.sleep(0.03)
        found = [tokens_of(handle) for handle in handles]
    assert found == [alone(decoder, request) for request in asked]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("proposer", ["heads", "none"])
def test_served_requests_use_captured_steps(decoder, tokenizer, proposer, lag):
    """Sequences with parameters of their own join, leave and end; one is cancelled; others need the ordinary loop."""
    options = {"heads": str(DEMO_HEADS), "tree_size": 12} if proposer == "heads" else {}
    captured = Decoder(decoder.target, proposer, step="eager", **options)
    captured.graphs.lag = lag
    asked = requests(tokenizer)
    with Engine(captured, tokenizer, max_rows=3) as engine:
        lost = engine.submit(request(asked[0].prompt, max_new_tokens=1500, temperature=3.0, seed=1))
        handles = [engine.submit(one) for one in asked]
        outputs = iter(lost)
        next(outputs)
        lost.cancel()
        found = [tokens_of(handle) for handle in handles]
    assert found == [alone(decoder, one) for one in asked]
    assert len(captured.graphs) >= 1
    assert lost.result.reason == "cancelled"
    assert [handle.result.passes for handle in handles] == [len(handle.result.lengths) for handle in handles]


def test_text_and_trace_fit_the_tokens(decoder, tokenizer, engine):
    handle = engine.submit(requests(tokenizer, trace=True)[0])
    outputs = list(handle)
    tokens = [token for output in outputs for token in output.tokens]
    assert "".join(output.text for output in outputs) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert max(len(output.tokens) for output in outputs) > 1
    for output in outputs:
        assert len(output.sources) == len(output.texts) == len(output.tokens)
        tree = output.tree
        assert tree.sources[0] == "root"
        assert all(parent < node for node, parent in enumerate(tree.parents[1:], 1))
        path = [tree.tokens[node] for node in tree.accepted[1:]]
        assert path[: len(output.tokens)] == output.tokens[: len(path)]
        for depth, (before, node) in enumerate(zip(tree.accepted, tree.accepted[1:], strict=False), 1):
            assert tree.parents[node] == before
            if depth <= len(output.tokens):
                expected = f"heads {depth}" if tree.sources[node] == "heads" else tree.sources[node]
                assert output.sources[depth - 1] == expected
    assert {source.split()[0] for output in outputs for source in output.sources} <= {"heads", "ngram", "bonus"}
    assert any(source.startswith("heads") for output in outputs for source in output.sources)
    assert handle.result.passes == len(outputs)
    assert sum(handle.result.lengths) == handle.result.new_tokens == len(tokens)


def test_stop_texts_end_the_output_before_them(decoder, tokenizer, engine):
    asked = requests(tokenizer)[0]
    whole = tokenizer.decode(alone(decoder, asked), skip_special_tokens=True)
    stop = whole[12:19]
    handle = engine.submit(request(prompt=asked.prompt, max_new_tokens=60, stop=("never there", stop)))
    assert handle.wait() == whole[: whole.find(stop)]
    assert handle.result.reason == "stop"
    assert engine.submit(asked).wait() == whole


def test_reasons(tokenizer, engine):
    prompt = requests(tokenizer)[0].prompt
    short = engine.submit(request(prompt=prompt, max_new_tokens=3))
    long = engine.submit(request(prompt=prompt, max_new_tokens=400))
    short.wait(), long.wait()
    assert (short.result.reason, short.result.new_tokens) == ("length", 3)
    assert (long.result.reason, long.result.new_tokens < 400) == ("stop", True)
    late = engine.submit(request(prompt=prompt, max_new_tokens=400, temperature=2.0, seed=1, time_limit=0.02))
    late.wait()
    assert late.result.reason == "timeout"
    assert engine.statistics().ended == {"length": 1, "stop": 1, "timeout": 1}


def test_a_cancelled_request_frees_its_row_within_a_second(tokenizer, engine):
    endless = request(prompt=requests(tokenizer)[0].prompt, max_new_tokens=1500, temperature=3.0, seed=1)
    handle = engine.submit(endless)
    outputs = iter(handle)
    next(outputs)
    assert engine.statistics().running == 1
    handle.cancel()
    began = time.perf_counter()
    for _ in outputs:
        pass
    assert time.perf_counter() - began < 1
    assert engine.statistics().running == 0
    assert handle.result.reason == "cancelled"


def test_the_queue_is_bounded_and_fair(decoder, tokenizer):
    prompt = requests(tokenizer)[0].prompt
    with Engine(decoder, tokenizer, max_rows=1, max_queue=2) as engine:
        order: list[int] = []
        engine.listeners.append(lambda request, result: order.append(request.params.seed))
        asked = [request(prompt, max_new_tokens=60, temperature=1.0, seed=seed) for seed in range(4)]
        handles = [engine.submit(asked[0])]
        next(iter(handles[0]))
        handles += [engine.submit(one) for one in asked[1:3]]
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            engine.submit(asked[3])
        for handle in handles[1:]:
            handle.wait()
    assert order == [0, 1, 2]


def test_many_threads_and_an_event_loop_may_ask_at_once(decoder, tokenizer, engine):
    asked = requests(tokenizer)
    found: dict[int, list[int]] = {}

    def client(number: int) -> None:
        found[number] = tokens_of(engine.submit(asked[number]))

    async def gather() -> list[list[int]]:
        async def one(request: Request) -> list[int]:
            return [token async for output in engine.submit(request).stream() for token in output.tokens]

        return await asyncio.gather(*[one(request) for request in asked])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    streamed = asyncio.run(gather())
    for thread in threads:
        thread.join()
    engine.close()
    expected = [alone(decoder, request) for request in asked]
    assert streamed == expected
    assert [found[number] for number in range(len(asked))] == expected


def test_a_failure_ends_the_requests_of_its_batch_alone(decoder, tokenizer, engine, monkeypatch, caplog):
    from medhead.proposers.ngram import NgramProposer

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(NgramProposer, "propose", fail)
    asked = requests(tokenizer)
    good = engine.submit(replace(asked[2], proposer="none"))
    bad = engine.submit(replace(asked[0], proposer="ngram"))
    with pytest.raises(EngineError, match="the engine failed"):
        bad.wait()
    assert tokens_of(good) == alone_after(engine, decoder, asked[2])
    assert "a bug" in caplog.text
    assert bad.result.reason == "error"


@pytest.mark.parametrize("where", ["read_chunk", "keep_rows"])
def test_after_a_failure_others_are_served(decoder, tokenizer, engine, monkeypatch, caplog, where):
    """While the first prompt of an idle engine is read, and while rows leave that have ended in the same step."""
    asked = requests(tokenizer)
    owner = type(decoder.target) if where == "read_chunk" else TreeCache
    with monkeypatch.context() as broken:
        broken.setattr(owner, where, lambda *_: 1 / 0)
        bad = [engine.submit(request(asked[0].prompt, max_new_tokens=most)) for most in (40, 80, 120)]
        for _ in range(300):  # none of them may wait for ever
            if all(handle.done for handle in bad):
                break
            time.sleep(0.1)
        assert [handle.result.reason for handle in bad] == ["error"] * 3
        assert engine.statistics().running == 0
    assert "division by zero" in caplog.text
    good = engine.submit(asked[2])
    assert tokens_of(good) == alone_after(engine, decoder, asked[2])


def alone_after(engine: Engine, decoder: Decoder, request: Request) -> list[int]:
    engine.close()
    return alone(decoder, request)


def test_the_model_is_left_as_it_was(decoder, tokenizer):
    before = decoder.model.config._attn_implementation
    with Engine(decoder, tokenizer) as engine:
        engine.submit(requests(tokenizer)[1]).wait()
        for _ in range(100):
            if decoder.model.config._attn_implementation == before:
                break
            time.sleep(0.01)
        assert decoder.model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [10**6]}, "outside the model's vocabulary"),
        ({"prompt": [5] * 5000}, "context"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": -1}, "temperature must be from 0 to 100, got -1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"tree_size": 1000}, "tree_size must be"),
        ({"proposer": "oracle"}, "no proposer is called 'oracle'"),
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": "5"}, "time_limit"),
        ({"stop": "END"}, "stop must be a tuple of strings, got 'END'"),
        ({"stop": (1,)}, "stop must be a tuple of strings"),
    ],
)
def test_wrong_requests_get_one_line(engine, options, words):
    with pytest.raises(MedheadError, match=words) as caught:
        engine.submit(request(**({"prompt": [5, 6, 7]} | options)))
    assert "\n" not in str(caught.value)


def test_an_engine_that_does_not_run_says_so(decoder, tokenizer):
    engine = Engine(decoder, tokenizer)
    with pytest.raises(Stopped):
        engine.submit(request(prompt=[5]))
    with engine:
        endless = engine.submit(request(prompt=[5, 6], max_new_tokens=1500, temperature=3.0))
        next(iter(endless))
    assert endless.result.reason == "cancelled"
    with pytest.raises(Stopped):
        engine.submit(request(prompt=[5]))
    with pytest.raises(MedheadError, match="max_rows"):
        Engine(decoder, tokenizer, max_rows=0)


def test_output_holds_back_what_may_be_a_stop_text(tokenizer):
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    output = Detokenizer(tokenizer, ["two th!", "xyz"])
    shown = []
    for token in ids:
        output.add(token)
        shown.append(output.take())
    text = "".join(shown)
    assert "one two three".startswith(text)
    assert text + output.finish() == "one two three"
    assert not output.stopped
    output = Detokenizer(tokenizer, ["two"])
    for token in ids:
        output.add(token)
    assert output.stopped
    assert output.finish() == "one "


def test_output_keeps_the_special_tokens_that_are_asked_for(tokenizer):
    ids = tokenizer("one", add_special_tokens=False)["input_ids"]
    end, kept = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|assistant|>")
    output = Detokenizer(tokenizer, special_tokens=[kept])
    for token in [*ids, kept, end, *ids]:
        output.add(token)
    assert output.finish() == "one<|assistant|>one"
