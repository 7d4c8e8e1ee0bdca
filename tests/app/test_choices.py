"""Several texts of one request, log probabilities, and what else clients send, by the official client."""

from __future__ import annotations

import json
import logging
import re
import socket
from typing import Any

import httpx
import pytest
import test_api
from app_engine import FakeEngine
from test_api import MESSAGES, Serve, client, post, wait_for

from medhead_app.api import conformance
from medhead_app.service import Service

serve, real = test_api.serve, test_api.real  # fixtures

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a", "max_tokens": 12, "temperature": 1.0, "seed": 7}
Real = tuple[str, Service]


def complete(address: str, **fields: Any) -> dict[str, Any]:
    response = post(address, "completions", messages=None, **(COMPLETION | fields))
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def texts_of(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


# ---------------------------------------------------------------- n, best_of, lists of prompts, echo


def test_n_gives_the_texts_of_seeds_that_follow_each_other(real: Real) -> None:
    address, _ = real
    answer = complete(address, n=3)
    alone = [complete(address, seed=7 + index) for index in range(3)]
    assert texts_of(answer) == [texts_of(one)[0] for one in alone] == texts_of(complete(address, n=3, proposer="none"))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["medhead"]["seed"] for choice in answer["choices"]] == [7, 8, 9]
    assert answer["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]  # once
    assert answer["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)


def test_streams_of_several_prompts_and_choices(real: Real) -> None:
    address, _ = real
    fields = COMPLETION | {"prompt": ["Once upon a", "The dragon"], "n": 2}
    whole = complete(address, **fields)
    stream = client(address).completions.create(stream=True, stream_options={"include_usage": True}, **fields)
    texts, finished, last = [""] * 4, set(), None
    for last in stream:
        for choice in last.choices:
            texts[choice.index] += choice.text
            finished |= {choice.index} if choice.finish_reason else set()
    of_each = [complete(address, **fields | {"prompt": prompt}) for prompt in ("Once upon a", "The dragon")]
    assert texts == texts_of(whole) == [text for one in of_each for text in texts_of(one)]
    assert finished == {0, 1, 2, 3}
    assert last is not None
    assert last.usage is not None
    assert last.usage.model_dump()["total_tokens"] == whole["usage"]["total_tokens"]


def test_chat_with_n(serve: Serve) -> None:
    programs = client(serve())
    answer = programs.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello you"] * 2
    texts = ["", ""]
    for chunk in programs.chat.completions.create(model="tiny", messages=MESSAGES, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello you"] * 2


def test_best_of_returns_the_most_probable_texts(real: Real) -> None:
    address, _ = real
    every = complete(address, n=4, logprobs=0)["choices"]
    means = [sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["tokens"]) for one in every]
    ranked = sorted(range(4), key=lambda index: -means[index])
    answer = complete(address, n=2, best_of=4)
    assert texts_of(answer) == [every[index]["text"] for index in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    for fields in ({"best_of": 2, "stream": True}, {"best_of": 1, "n": 2}):
        refused = post(address, "completions", messages=None, **(COMPLETION | fields))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")


def test_echo(serve: Serve) -> None:
    address = serve()
    assert texts_of(complete(address, echo=True, prompt=["Once ", "upon "])) == ["Once Hello you", "upon Hello you"]
    chunks = client(address).completions.create(**COMPLETION, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Once upon aHello you"
    refused = post(address, "completions", messages=None, **COMPLETION, echo=True, logprobs=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "echo")


# ---------------------------------------------------------------- options, exact under speculation


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"repetition_penalty": 1.5},
        {"logit_bias": {"20": 8, "21": 8}},
        {"ignore_eos": True, "min_tokens": 5},
        {"stop_token_ids": list(range(20, 60))},
    ],
)
def test_options_change_the_text_and_speculation_does_not(real: Real, fields: dict[str, Any]) -> None:
    address, _ = real
    fields = fields | {"max_tokens": 24, "temperature": 0.5}
    with_trees, plain = complete(address, **fields), complete(address, **fields, proposer="none")
    assert texts_of(with_trees) == texts_of(plain)
    counts = [
        {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        for usage in (with_trees["usage"], plain["usage"])
    ]
    assert counts[0] == counts[1]
    if "ignore_eos" in fields:
        assert with_trees["usage"]["completion_tokens"] == 24
    if "stop_token_ids" in fields:
        assert with_trees["choices"][0]["finish_reason"] == "stop"


# ---------------------------------------------------------------- log probabilities


def test_chat_log_probabilities(real: Real) -> None:
    address, service = real
    banned = {str(token): -100 for token in service.tokenizer.all_special_ids}
    fields: Any = {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 0.8, "seed": 3, "logprobs": True,
        "top_logprobs": 3, "logit_bias": banned,
    }  # fmt: skip
    answer = client(address).chat.completions.create(**fields)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens
    joined = b"".join(bytes(token.bytes or []) for token in content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content
    for token in content:
        listed = [one.logprob for one in token.top_logprobs]
        assert listed == sorted(listed, reverse=True)
        assert len(listed) == 3
        assert token.logprob <= max(listed) + 1e-6 <= 1e-5
    streamed: list[Any] = []
    for chunk in client(address).chat.completions.create(stream=True, **fields):
        found = chunk.choices[0].logprobs
        streamed += found.content or [] if found is not None else []
    assert [token.token for token in streamed] == [token.token for token in content]
    plain = client(address).chat.completions.create(**fields, extra_body={"proposer": "none"}).choices[0].logprobs
    assert plain is not None
    assert [token.logprob for token in plain.content or []] == pytest.approx([one.logprob for one in content], abs=1e-3)


def test_completion_log_probabilities(real: Real) -> None:
    address, _ = real
    choice = client(address).completions.create(**COMPLETION, logprobs=2).choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.text_offset == [len("".join(found.tokens[:index])) for index in range(len(found.tokens))]
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] >= logprob
        assert 1 <= len(top) <= 3
    offsets = []
    for chunk in client(address).completions.create(**COMPLETION, logprobs=2, stream=True):
        part = chunk.choices[0].logprobs
        offsets += part.text_offset or [] if part is not None else []
    assert offsets == found.text_offset


# ---------------------------------------------------------------- clients that go away, full queues


@pytest.mark.parametrize("stream", [True, False])
def test_all_choices_end_when_the_client_goes_away(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(outputs=("x",) * 100, pause=0.2)
    address = serve(engine)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": stream, "n": 3}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        assert wait_for(lambda: len(engine.handles) == 3, 5)
    assert wait_for(lambda: all(handle.done for handle in engine.handles), 5)
    assert {handle.result.reason for handle in engine.handles} == {"cancelled"}


def test_a_queue_that_takes_only_some_choices_takes_none(serve: Serve) -> None:
    engine = FakeEngine(pause=2, room=3)
    address = serve(engine)
    fields = {"model": "tiny", "messages": MESSAGES, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=fields):
        assert wait_for(lambda: len(engine.handles) == 1, 5)
        assert post(address, n=3).status_code == 429
        assert wait_for(lambda: all(handle.done for handle in engine.handles[1:]), 1.5)
        assert [handle.cancelled for handle in engine.handles] == [False, True, True]
    refused = post(address, n=4)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


# ---------------------------------------------------------------- hints, model object, access log, /docs


def test_hints_are_ignored(serve: Serve) -> None:
    hints: dict[str, Any] = {
        "metadata": {"run": "5"},
        "service_tier": "flex",
        "prediction": {"type": "content", "content": "Hello"},
        "prompt_cache_key": "k",
        "priority": 3,
        "request_id": "a",
        "skip_special_tokens": True,
    }
    assert post(serve(), **hints).json()["choices"][0]["message"]["content"] == "Hello you"


def test_the_table_of_fields_says_what_the_api_does(serve: Serve) -> None:
    address = serve()
    paths = {
        "completions": {"prompt": "Once"},
        "chat/completions": {"messages": MESSAGES},
        "responses": {"input": "Once"},
    }
    for path, kind in conformance.BODIES.items():
        for name in conformance.fields():
            found = httpx.post(
                f"{address}/v1/{path}", json={"model": "tiny", **paths[path], name: [{"odd": [1]}]}, timeout=60
            )
            kept = conformance.status(kind, name)
            error = found.json()["error"]
            assert found.status_code in (400, 404), (path, name)
            assert error["param"].startswith(name), (path, name, error)
            if kept == "no" or kept.startswith("only"):
                assert error["code"] in ("unsupported_parameter", "unknown_parameter"), (path, name)


def test_the_page_of_the_api_loads_nothing(serve: Serve) -> None:
    page = httpx.get(f"{serve()}/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"src=|href=|url\(|@import|http", page.text)
    assert "<code>logit_bias</code>" in page.text
    assert "/v1/responses" in page.text


def test_the_model_was_created_when_the_server_started(serve: Serve) -> None:
    model = client(serve()).models.retrieve("tiny")
    assert abs(model.created - test_api.time.time()) < 3600


def test_the_access_log_has_one_line_for_a_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    address = serve()
    with caplog.at_level(logging.INFO, "medhead_app.access"):
        post(address, n=2)
        post(address, stream=True)
        post(address, n=0)
        httpx.get(f"{address}/v1/odd%0Aname")
        httpx.get(f"{address}/health")
        assert wait_for(lambda: len(caplog.records) >= 4, 2)
    lines = [re.sub(r"[\d.]+ s$", "s", record.getMessage()) for record in caplog.records]
    assert lines == [
        "POST /v1/chat/completions 200 12 tokens s",
        "POST /v1/chat/completions 200 6 tokens s",
        "POST /v1/chat/completions 400 0 tokens s",
        "GET /v1/odd%0Aname 404 0 tokens s",
    ]
