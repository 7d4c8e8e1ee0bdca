"""Answers of the page in process: updates, limits, continuation, failures."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from page_engine import (
    STORY,
    ScriptedEngine,
    all_of,
    answered,
    question,
    run_async,
    service_of,
    wait_until_idle,
)

from conftest import tiny_llama
from medhead import Decoder
from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.serving import Engine, QueueFullError, RequestHandle, TreeView
from medhead_app.chat.conversation import Conversation, add_message
from medhead_app.chat.generation import ChatSettings, StreamState, Update, generate_answer, join_texts
from medhead_app.chat.svg import is_valid_tree
from medhead_app.service import Service

ATTACK = '<b>bold</b><script>window.pwned = 1</script> & <img src=x onerror="alert(1)"> "\''


def test_an_answer_comes_in_updates() -> None:
    service = service_of(delay=0.002)
    settings = ChatSettings(
        system="Be kind.", temperature=0.5, max_new_tokens=24, seed=5, proposer="ngram", tree_size=8
    )
    updates: list[Update] = run_async(all_of(generate_answer(service, question(), settings, interval=0)))
    texts = [update.conversation["messages"][-1]["content"] for update in updates]
    assert len(set(texts)) >= 8
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert [update.done for update in updates] == [False] * (len(updates) - 1) + [True]
    message = updates[-1].conversation["messages"][-1]
    assert STORY.startswith(message["content"])
    assert "".join(text for text, _ in message["tokens"]) == message["content"]
    assert message["lengths"] == [3] * 8
    assert message["note"] == "stopped at the token limit"
    assert is_valid_tree(message["tree"])
    assert service.decode(message["token_ids"]) == message["content"]
    assert (message["seed"], "n-gram · seed 5" in message["summary"]) == (5, True)
    request = service.engine.requests[0]  # type: ignore[attr-defined]
    assert request.params == SamplingParams(24, 0.5, 0.95, seed=5)
    assert (request.proposer, request.tree_size) == ("ngram", 8)
    assert request.trace
    assert "Be kind." in service.tokenizer.decode(request.prompt)


def test_updates_are_not_more_frequent_than_the_interval() -> None:
    updates = run_async(all_of(generate_answer(service_of(delay=0.002), question(), ChatSettings(), interval=10)))
    assert len(updates) == 3  # the first, one, the last
    assert updates[-1].conversation["messages"][-1]["content"] == STORY


def test_closing_an_answer_cancels_its_request() -> None:
    service = service_of(delay=0.01)
    handles: list[RequestHandle] = []

    async def close() -> None:
        stream = generate_answer(service, question(), ChatSettings(max_new_tokens=500), handles.append, interval=0)
        async for update in stream:
            if update.conversation["messages"][-1]["lengths"]:
                break
        await stream.aclose()

    run_async(close())
    assert handles[0].cancelled
    wait_until_idle(service, 1.0)


def test_a_stopped_answer_keeps_its_text() -> None:
    service = service_of(delay=0.005)

    async def stop() -> Update:
        handles: list[RequestHandle] = []
        async for update in generate_answer(
            service, question(), ChatSettings(max_new_tokens=500), handles.append, interval=0
        ):
            if len(update.conversation["messages"][-1]["lengths"]) == 3:
                handles[0].cancel()
        return update

    update = run_async(stop())
    assert update.done
    assert update.conversation["messages"][-1]["note"] == "stopped by you"
    assert update.conversation["messages"][-1]["content"]


@pytest.mark.parametrize("reason", ["length", "cancelled"])
def test_a_cut_answer_is_continued(tokenizer: Any, reason: str) -> None:
    model = tiny_llama(vocab=len(tokenizer), context=256)
    model.generation_config.eos_token_id = None
    settings = ChatSettings(temperature=1.0, max_new_tokens=24)
    with Engine(Decoder(model, "ngram"), tokenizer) as engine:
        service = Service(engine, tokenizer, "tiny")
        whole = answer(service, question(), replace(settings, max_new_tokens=48, seed=4))
        cut = answer(service, question(), replace(settings, seed=4))
        if reason == "cancelled":
            cut["messages"][-1]["note"] = "stopped by you"
        both = answer(service, cut, settings, go_on=True)
        assert both["messages"][-1]["token_ids"] == whole["messages"][-1]["token_ids"]
        assert both["messages"][-1]["content"] == whole["messages"][-1]["content"]
    first, last = cut["messages"][-1], both["messages"][-1]
    assert last["lengths"][: len(first["lengths"])] == first["lengths"]
    assert sum(last["lengths"]) == len(last["token_ids"]) == 48
    assert last["seconds"] > first["seconds"]
    assert "48 tokens" in last["summary"]
    assert last["tokens"][: len(first["tokens"])] == first["tokens"]


def answer(service: Service, conversation: Conversation, settings: ChatSettings, **options: Any) -> Conversation:
    return run_async(all_of(generate_answer(service, conversation, settings, interval=0, **options)))[-1].conversation


def test_a_complete_answer_is_not_continued() -> None:
    for conversation in (answered("one"), question()):
        with pytest.raises(MedheadError, match="cannot be continued"):
            answer(service_of(), conversation, ChatSettings(), go_on=True)


@pytest.mark.parametrize(
    ("cut", "text", "whole"),
    [
        ("The dog", "ran", "The dog ran"),
        ("The \ufffd", "\ufffd\ufffd ran", "The 🐕 ran"),
        ("The dog", "ran", "The dog ran \ufffd"),
        ("The dog", "", "The dog \ufffd"),
        ("The dog", " ran", "The dog ran</s>"),
    ],
)
def test_the_two_parts_of_a_continued_answer_are_joined(cut: str, text: str, whole: str) -> None:
    joined = join_texts(cut, text, whole)
    assert joined == whole.removesuffix("</s>").removesuffix(" \ufffd")


def test_a_long_conversation_is_cut_and_says_so() -> None:
    conversation = answered(*[f"{number} " + "word " * 30 for number in range(20)])
    service = service_of(context=200)
    asked = add_message(conversation, "and now?")
    updates = run_async(all_of(generate_answer(service, asked, ChatSettings(max_new_tokens=20), interval=0)))
    message = updates[-1].conversation["messages"][-1]
    assert message["dropped"] > 0
    assert len(updates[-1].conversation["messages"]) == 42  # nothing is lost on the page
    view = pytest.importorskip("medhead_app.chat.view", reason="markdown-it-py is not installed").message_view
    assert f"{message['dropped']} older messages were left out" in view(message)["notice"]


def test_failures_are_one_line() -> None:
    updates = run_async(all_of(generate_answer(service_of(fail="it broke"), question(), ChatSettings(), interval=0)))
    assert (updates[-1].error, updates[-1].done) == ("it broke", True)
    assert updates[-1].conversation["messages"][-1]["content"]  # what came before is kept
    with pytest.raises(QueueFullError, match="waiting already"):
        run_async(all_of(generate_answer(service_of(max_rows=0, max_queue=0), question(), ChatSettings())))


def test_settings_from_the_fields() -> None:
    raw = {
        "temperature": 1,
        "top_p": "0.5",
        "max_new_tokens": 5000,
        "seed": " 12 ",
        "proposer": "none",
        "tree_size": "16",
    }
    settings = ChatSettings.from_fields(raw, 100)
    assert settings == ChatSettings("", 1.0, 0.5, 100, 12, "none", 16)
    assert ChatSettings.from_fields({"seed": "", "tree_size": "automatic"}, 100).seed is None
    assert ChatSettings.from_fields(asdict(settings), 100) == settings
    for bad in ({"seed": "x"}, {"temperature": None}, {"tree_size": "big"}):
        with pytest.raises(MedheadError, match="not a number"):
            ChatSettings.from_fields(bad, 100)


def test_each_answer_without_a_seed_draws_one() -> None:
    service = service_of()
    seeds = {ChatSettings().request(service, [1]).params.seed for _ in range(5)}
    assert len(seeds) > 1
    automatic = ChatSettings().request(service, [1])
    assert (automatic.proposer, automatic.tree_size) == (None, None)


def test_the_stream_state_ignores_trees_without_draft_tokens() -> None:
    stream = StreamState()
    output = SimpleNamespace(
        text="a", tokens=[0], texts=["a"], sources=["bonus"], tree=TreeView([0], [0], ["root"], [0])
    )
    stream.add(output)  # type: ignore[arg-type]
    assert stream.tree(ScriptedEngine().tokenizer) is None
    assert stream.tokens == [["a", "bonus"]]
