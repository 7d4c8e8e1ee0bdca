"""The API as programs see it: the official client against a running server."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from app_engine import CONTEXT, FakeEngine
from pydantic import BaseModel, Field

from medhead import Decoder
from medhead.config import SamplingParams
from medhead.model.loading import load_model, load_tokenizer, pick_device, pick_dtype
from medhead.serving import Engine
from medhead_app.listen import run_in_thread
from medhead_app.server import build_app
from medhead_app.service import Service

MESSAGES: Any = [{"role": "user", "content": "Once upon a time"}]
Serve = Callable[..., str]


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Serve]:
    """Start a server for an engine, by default a fake one; return its URL."""
    with ExitStack() as stack:

        def start(engine: Any = None, **options: Any) -> str:
            service = Service((engine or FakeEngine()).start(), tokenizer, "tiny")
            return stack.enter_context(run_in_thread(build_app(service, **options), service))

        yield start


@pytest.fixture(scope="module")
def real(folders: dict[str, Path]) -> Iterator[tuple[str, Service]]:
    """Serve a tiny random model with random heads by the real engine."""
    device = pick_device("cpu")
    model = load_model(folders["model"], device, pick_dtype("float32", device))
    decoder = Decoder(model, "hybrid", heads=str(folders["recurrent"]), tree_size=8)
    tokenizer = load_tokenizer(folders["model"])
    engine = Engine(decoder, tokenizer, heads=str(folders["recurrent"]), max_rows=4, max_queue=64).start()
    service = Service(engine, tokenizer, "tiny")
    with run_in_thread(build_app(service), service) as address:
        yield address, service


def client(address: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", **({"api_key": "none", "max_retries": 0} | options))


def post(address: str, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/{path}", json={"model": "tiny", "messages": MESSAGES} | fields, timeout=20)


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Return whether the condition becomes true in time."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return what()


# ---------------------------------------------------------------- answers, by the official client


def test_chat_with_the_official_client(serve: Serve) -> None:
    answer = client(serve()).chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, seed=5)
    assert answer.choices[0].message.content == "Hello you"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    medhead = answer.model_extra["medhead"]  # type: ignore[index]
    assert medhead["passes"] == 3
    assert medhead["accepted_length"] == 2.0
    assert set(medhead) >= {
        "proposer",
        "seconds",
        "service_time",
        "queue_time",
        "time_to_first_token",
        "tokens_per_second",
        "seed",
        "reason",
    }


def test_chat_streams_as_it_comes(serve: Serve) -> None:
    stream = client(serve(FakeEngine(pause=0.15))).chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    texts, times, chunks = [], [], []
    for chunk in stream:
        chunks.append(chunk)
        if chunk.choices and chunk.choices[0].delta.content:
            texts.append(chunk.choices[0].delta.content)
            times.append(time.perf_counter())
    assert texts == ["Hel", "lo ", "you"]
    assert times[2] - times[0] > 0.2  # not all at the end
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].model_extra["medhead"]["passes"] == 3  # type: ignore[index]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_there_is_none(serve: Serve) -> None:
    chunks = list(client(serve()).chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_completions_whole_and_streamed(serve: Serve) -> None:
    programs = client(serve())
    whole = programs.completions.create(model="tiny", prompt="Once upon", max_tokens=8)
    assert whole.choices[0].text == "Hello you"
    assert whole.usage is not None
    stream = programs.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=8, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello you"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra["medhead"]["passes"] == 3  # type: ignore[index]


def test_the_asynchronous_client(serve: Serve) -> None:
    address = serve(FakeEngine(pause=0.05))

    async def use() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as programs:
            whole = programs.chat.completions.create(model="tiny", messages=MESSAGES)
            stream = await programs.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return ["".join(texts), (await whole).choices[0].message.content or ""]

    assert asyncio.run(use()) == ["Hello you"] * 2


def test_models(serve: Serve) -> None:
    programs = client(serve())
    assert [model.id for model in programs.models.list()] == ["tiny"]
    assert programs.models.retrieve("tiny").owned_by == "medhead"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        programs.models.retrieve("somebody/else")


def test_fields_reach_the_engine(serve: Serve) -> None:
    engine = FakeEngine()
    address = serve(engine)
    client(address).chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "Be kind."}, *MESSAGES],
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        stop=["a", "b"],
        user="me",
        n=1,
        frequency_penalty=0,
        logprobs=False,
        tools=[],
        response_format={"type": "text"},
        extra_body={
            "top_k": 20,
            "min_p": 0.1,
            "proposer": "ngram",
            "tree_size": 7,
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 4,
            "min_tokens": 2,
        },
    )
    request = engine.handles[0].request
    assert request.params == SamplingParams(9, 0.5, 0.9, 20, 0.1, 2**64 - 1, ("a", "b"), 1.1, 4, 2)
    assert (request.proposer, request.tree_size) == ("ngram", 7)
    post(address)
    assert engine.handles[1].request.params == SamplingParams(CONTEXT - len(engine.handles[1].request.prompt), 1.0)
    post(address, temperature=0, top_p=0.5)  # greedy decoding ignores top_p
    assert engine.handles[2].request.params == replace(engine.handles[1].request.params, temperature=0)
    post(address, "completions", messages=None, prompt="Once")
    assert engine.handles[3].request.params.max_new_tokens == 16  # OpenAI's default
    post(address, top_k=-1, top_p=1)  # the model's own values are switched off
    assert (engine.handles[4].request.params.top_k, engine.handles[4].request.params.top_p) == (0, 1)


def test_the_model_says_the_temperature_of_requests_without_one(serve: Serve) -> None:
    engine = FakeEngine()
    engine.decoder.target.model.generation_config.temperature = 0.6
    address = serve(engine)
    post(address)
    post(address, temperature=1.5)
    assert [handle.request.params.temperature for handle in engine.handles] == [0.6, 1.5]


def test_messages_with_the_fields_of_other_clients(
    serve: Serve, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name reaches the template; fields that say nothing are left out."""
    template = "{% for m in messages %}{{ m.role }} {{ m.name or '-' }} {{ m.content }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    engine = FakeEngine()
    empty = {"refusal": None, "annotations": [], "audio": None, "tool_calls": [], "function_call": None}
    part = {"type": "text", "text": "Hi", "annotations": [], "cache_control": None}
    messages = [
        {"role": "developer", "content": "Be kind.", "name": None},
        {"role": "user", "content": [part], "name": "Ann"},
        {"role": "assistant", "content": "Yes", **empty},
        {"role": "user", "content": "And?"},
    ]
    assert post(serve(engine), messages=messages).status_code == 200
    said = tokenizer.decode(engine.handles[0].request.prompt)
    assert said == "system - Be kind.;user Ann Hi;assistant - Yes;user - And?;"


def test_answers_can_be_sent_back_as_they_came(serve: Serve) -> None:
    engine = FakeEngine()
    programs = client(serve(engine))
    answer = programs.chat.completions.create(model="tiny", messages=MESSAGES)
    said = answer.choices[0].message.model_dump()  # with all its empty fields
    parts = {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]}
    programs.chat.completions.create(model="tiny", messages=[*MESSAGES, said, parts])  # type: ignore[list-item]
    assert len(engine.handles[1].request.prompt) > len(engine.handles[0].request.prompt)


# ---------------------------------------------------------------- structured output


class Answer(BaseModel):
    """What the model is asked for."""

    color: Literal["red", "green"]
    number: Annotated[int, Field(ge=0, le=9)]


def test_the_official_client_gets_parsed_answers(real: tuple[str, Service]) -> None:
    answers = [
        client(real[0]).chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Answer, seed=4, extra_body={"proposer": proposer}
        )
        for proposer in ("none", "hybrid", "ngram")
    ]
    parsed = [answer.choices[0].message.parsed for answer in answers]
    assert isinstance(parsed[0], Answer)
    assert parsed == [parsed[0]] * 3
    assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "a{3}b?"}, "a{3}b?"),
        ({"guided_grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"guided_json": '{"enum": [1, 2]}'}, "1|2"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"const": True}}}, "true"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 1}, "[{].*"),
    ],
)
def test_fields_that_constrain_an_answer(real: tuple[str, Service], fields: dict[str, Any], pattern: str) -> None:
    answer = post(real[0], **fields).json()["choices"][0]
    assert re.fullmatch(pattern, answer["message"]["content"])
    assert answer["finish_reason"] == ("length" if "max_tokens" in fields else "stop")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"banana": 1}, "banana", "unknown_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 101}, "n", "invalid_value"),  # more than the queue holds
        ({"best_of": 2}, "best_of", "unsupported_parameter"),  # completions have it
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"presence_penalty": "1"}, "presence_penalty", "invalid_value"),
        ({"logprobs": 3}, "logprobs", "invalid_value"),  # completions have a number
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [5]}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
        ({"stop_token_ids": 5}, "stop_token_ids", "invalid_value"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_value"),
        ({"metadata": "me"}, "metadata", "invalid_type"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format.json_schema.schema",
            "invalid_value",
        ),
        ({"guided_json": {"not": {}}}, "guided_json", "invalid_value"),
        ({"guided_json": 5}, "guided_json", "invalid_value"),
        ({"guided_regex": "[a-"}, "guided_regex", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"guided_choice": [1]}, "guided_choice", "invalid_value"),
        ({"guided_grammar": "start: other"}, "guided_grammar", "invalid_value"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_value"),
        ({"structured_outputs": {"banana": 1}}, "structured_outputs.banana", "unsupported_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, "max_tokens", "invalid_value"),
        ({"max_tokens": 63}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"proposer": "oracle"}, "proposer", "invalid_value"),
        ({"tree_size": 257}, "tree_size", "invalid_value"),
        ({"user": 5}, "user", "invalid_type"),
        ({"model": 5}, "model", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x", "banana": 5}]}, "messages[0].banana", "unsupported_parameter"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
                ]
            },
            "messages[0].content",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "dragon " * 100}]}, None, "context_length_exceeded"),
        ({"messages": MESSAGES * 30}, None, "context_length_exceeded"),  # the API truncates nothing
    ],
)
def test_wrong_fields_are_refused_by_name(serve: Serve, fields: dict[str, Any], param: str | None, code: str) -> None:
    engine = FakeEngine()
    body = json.dumps({"model": "tiny", "messages": MESSAGES} | fields)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{serve(engine)}/v1/chat/completions", content=body, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
    assert param is None or param in error["message"]
    assert "\n" not in error["message"]
    assert engine.handles == []


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [1.5], [True], 7, ["a", 1], [[[1]]], ["a"] * 101])
def test_wrong_prompts_are_refused(serve: Serve, prompt: Any) -> None:
    response = post(serve(), "completions", messages=None, prompt=prompt)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b'{"temperature": NaN}', b"\xff", b'{"x": "\\ud800"}', b"[" * 100_000]
)
def test_bodies_that_are_not_json_objects_are_refused(serve: Serve, body: bytes) -> None:
    response = httpx.post(
        f"{serve()}/v1/chat/completions", content=body, headers={"Content-Type": "application/json; charset=utf-8"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_other_media_types_are_refused(serve: Serve) -> None:
    response = httpx.post(f"{serve()}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_errors_are_the_clients_own_exceptions(serve: Serve) -> None:
    programs = client(serve())
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as missing:
        programs.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="store is not supported") as refused:
        programs.chat.completions.create(model="tiny", messages=MESSAGES, store=True)
    assert refused.value.param == "store"


def test_unknown_addresses(serve: Serve) -> None:
    address = serve()
    for method, path in (("GET", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("GET", "/v1/nothing")):
        response = httpx.request(method, address + path)
        assert response.status_code == 404
        assert path in response.json()["error"]["message"]


def test_a_full_queue_says_when_to_retry(serve: Serve) -> None:
    engine = FakeEngine(pause=5, room=1)
    address = serve(engine)
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "stream": True}
    ):
        assert wait_for(lambda: len(engine.handles) == 1, 5)
        response = post(address)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client(address).chat.completions.create(model="tiny", messages=MESSAGES)
    assert 'endpoint="chat",reason="queue_full"} 2.0' in httpx.get(f"{address}/metrics").text


def test_a_stopped_engine(serve: Serve) -> None:
    engine = FakeEngine()
    address = serve(engine)
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0}
    engine.running = False
    response = post(address)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_stopped")
    assert httpx.get(f"{address}/health").status_code == 503


def test_a_stopping_server_ends_its_requests(serve: Serve) -> None:
    engine = FakeEngine(pause=10)
    address = serve(engine)
    threading.Timer(0.3, lambda: setattr(engine, "running", False)).start()
    assert post(address).status_code == 503


def test_failures_reach_the_client_without_a_trace(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    address = serve(FakeEngine(error="the device is gone"))
    response = post(address)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "the device is gone")
    with pytest.raises(openai.APIError, match="the device is gone"):
        list(client(address).chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    with caplog.at_level(logging.ERROR, "medhead_app"):
        response = post(serve(FakeEngine(raises=RuntimeError("secret of /etc"))))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


# ---------------------------------------------------------------- clients that go away


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(serve: Serve, stream: bool) -> None:
    engine = FakeEngine(outputs=("x",) * 100, pause=0.2 if stream else 10)
    address = serve(engine)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "messages": MESSAGES, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        assert wait_for(lambda: len(engine.handles) == 1, 5)
        assert not stream or connection.recv(1000)
        assert not engine.handles[0].cancelled
    assert wait_for(lambda: engine.handles[0].done, 1.0)
    assert engine.handles[0].result.reason == "cancelled"


def test_a_client_that_leaves_its_stream_frees_its_row(serve: Serve) -> None:
    engine = FakeEngine(outputs=("x",) * 100, pause=0.05)
    stream = client(serve(engine)).chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    assert wait_for(lambda: engine.handles[0].done, 1.0)


# ---------------------------------------------------------------- who is let in


def test_other_names_and_other_sites_are_refused(serve: Serve) -> None:
    address = serve()
    assert httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{address}/health", headers={"Host": "localhost:1"}).status_code == 200
    for origin, status in (("http://evil.example", 403), ("null", 403), (address, 200), ("http://localhost:99", 200)):
        response = httpx.post(
            f"{address}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES}, headers={"Origin": origin}
        )
        assert response.status_code == status, origin
    anywhere = serve(hosts=None)
    assert httpx.get(f"{anywhere}/health", headers={"Host": "my.example"}).status_code == 200


def test_a_password(serve: Serve) -> None:
    address = serve(auth=("me", "sécret"))
    assert httpx.get(f"{address}/health").status_code == 200
    response = httpx.get(f"{address}/v1/models")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Basic")
    with pytest.raises(openai.AuthenticationError):
        client(address, api_key="wrong").models.list()
    assert httpx.get(f"{address}/v1/models", auth=httpx.BasicAuth("me", "wrong")).status_code == 401
    assert httpx.get(f"{address}/v1/models", auth=httpx.BasicAuth("you", "sécret")).status_code == 401
    assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Basic !"}).status_code == 401
    assert httpx.get(f"{address}/v1/models", auth=httpx.BasicAuth("me", "sécret")).status_code == 200
    assert httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer sécret".encode()}).status_code == 200


def test_large_bodies_are_refused(serve: Serve) -> None:
    address = serve(max_body=1000)
    content = [{"role": "user", "content": "x" * 2000}]
    assert post(address, messages=content).status_code == 413
    joined = httpx.post(f"{address}/gradio_api/queue/join", json={"data": "x" * 2000})
    assert joined.json() == {"detail": "the body is larger than 1,000 bytes"}  # the page shows this field
    parts = iter([b"{" + b" " * 800, b" " * 800])  # without Content-Length
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{address}/v1/chat/completions", content=parts, headers=headers)
    assert (response.status_code, response.json()["error"]["message"]) == (413, "the body is larger than 1,000 bytes")
    assert post(address).status_code == 200


# ---------------------------------------------------------------- metrics


def test_metrics_count_what_happened(serve: Serve) -> None:
    address = serve()
    for _ in range(2):
        post(address)
    post(address, "completions", messages=None, prompt="Once", stream=True)
    text = httpx.get(f"{address}/metrics").text
    for line in (
        'medhead_requests_total{endpoint="chat",reason="stop"} 2.0',
        'medhead_requests_total{endpoint="completions",reason="stop"} 1.0',
        "medhead_new_tokens_total 18.0",
        "medhead_verify_passes_total 9.0",
        "medhead_accepted_length 2.0",
        "medhead_num_requests_running 0.0",
        "medhead_num_requests_waiting 0.0",
        "medhead_time_to_first_token_seconds_count 3.0",
        "medhead_time_per_output_token_seconds_count 3.0",
        "medhead_request_queue_time_seconds_count 3.0",
        "medhead_request_latency_seconds_count 3.0",
    ):
        assert line in text.splitlines(), line
    rate = next(line for line in text.splitlines() if line.startswith("medhead_tokens_per_second "))
    assert float(rate.split()[1]) > 0


def test_the_rate_looks_back_a_few_seconds() -> None:
    from medhead_app.metrics import Rate

    rate = Rate(window=10)
    assert rate.per_second == 0
    for second in range(20):
        rate.add(100 * min(second, 12), now=float(second))
    assert rate.per_second == pytest.approx(300 / 10)
    for second in range(20, 30):
        rate.add(1200, now=float(second))
    assert rate.per_second == 0


# ---------------------------------------------------------------- the real engine


def test_eight_clients_get_the_text_they_would_get_alone(real: tuple[str, Service]) -> None:
    address, _ = real
    prompts = [
        "Once",
        "upon a time there was",
        "Grüße!",
        "The dragon said: 日本語.",
        "She went",
        "home",
        "a cafe",
        "small",
    ]
    asked = [
        {"prompt": prompt, "seed": number, "temperature": (0, 0.7, 1.3)[number % 3], "max_tokens": 40}
        for number, prompt in enumerate(prompts)
    ]
    alone = [post(address, "completions", messages=None, **fields).json() for fields in asked]
    together: list[Any] = [None] * len(asked)

    def ask(number: int) -> None:
        stream = client(address).completions.create(model="tiny", stream=True, **asked[number])  # type: ignore[call-overload]
        together[number] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [answer["choices"][0]["text"] for answer in alone]
    assert together == texts
    assert len(set(texts)) == len(texts)
    assert all(answer["usage"]["completion_tokens"] > 0 for answer in alone)


def test_the_text_does_not_depend_on_the_proposer(real: tuple[str, Service]) -> None:
    address, _ = real
    fields = {"messages": None, "prompt": "Once upon a", "seed": 7, "max_tokens": 40}
    answers = [
        post(address, "completions", **fields, proposer=proposer, tree_size=size).json()
        for proposer, size in (("none", None), ("ngram", None), ("heads", 5), ("recycling", 9), (None, None))
    ]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert [answer["medhead"]["proposer"] for answer in answers] == ["none", "ngram", "heads", "recycling", "hybrid"]
    assert answers[0]["medhead"]["accepted_length"] == 1.0


def test_the_second_message_of_a_chat_reads_only_what_is_new(real: tuple[str, Service]) -> None:
    """Usage and metrics tell how many prompt tokens were known; the second prompt begins with the first and its answer."""
    address, service = real
    before = service.engine.statistics()
    fields: Any = {"model": "tiny", "temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
    prompt = service.encode("A prompt that no other test of this file has, about nothing at all.")
    first = client(address).completions.create(prompt=prompt, **fields)
    longer = [*prompt, *service.encode(" And then?")]
    second = client(address).completions.create(prompt=longer, n=2, **fields)
    stream = fields | {"stream": True, "stream_options": {"include_usage": True}}
    third = list(client(address).completions.create(prompt=longer, **stream))[-1]
    found = [answer.usage.prompt_tokens_details.cached_tokens for answer in (first, second, third)]  # type: ignore[union-attr]
    assert found[0] < len(prompt) // 2
    assert found[1:] == [len(prompt), len(longer) - 1]
    totals = service.engine.statistics()
    salted = fields | {"extra_body": {"ignore_eos": True, "cache_salt": "somebody else"}}
    assert client(address).completions.create(prompt=longer, **salted).usage.prompt_tokens_details.cached_tokens == 0  # type: ignore[union-attr]
    assert totals.prefix_hits - before.prefix_hits == found[0] + 2 * found[1] + found[2]
    assert totals.prefix_queries - before.prefix_queries == len(prompt) + 3 * len(longer)
    totals, metrics = service.engine.statistics(), httpx.get(f"{address}/metrics").text.splitlines()
    assert f"medhead_prefix_cache_hits_total {float(totals.prefix_hits)}" in metrics
    assert f"medhead_prefix_cache_queries_total {float(totals.prefix_queries)}" in metrics


def test_stop_texts_and_limits(real: tuple[str, Service]) -> None:
    address, service = real
    fields: dict[str, Any] = {"messages": None, "prompt": "Once upon a", "temperature": 0, "max_tokens": 40}
    whole = post(address, "completions", **fields).json()
    text = whole["choices"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = post(address, "completions", **fields, stop=stop).json()
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    short = post(address, "completions", **fields | {"max_tokens": 3}).json()
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["finish_reason"] == "length"
    assert post(address, "completions", messages=None, prompt=[10**6]).status_code == 400
    assert service.engine.statistics().running == 0


def test_a_client_that_goes_away_frees_the_real_row(real: tuple[str, Service]) -> None:
    address, service = real
    before = service.engine.statistics().ended.get("cancelled", 0)
    stream = client(address).chat.completions.create(model="tiny", messages=MESSAGES, stream=True, temperature=2)
    next(iter(stream))
    stream.close()
    assert wait_for(lambda: service.engine.statistics().running == 0, 1.0)
    assert service.engine.statistics().ended.get("cancelled", 0) in (before, before + 1)  # it may have been quicker
