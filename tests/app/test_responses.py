"""`/v1/responses` by the official client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import test_api
from app_engine import FakeEngine
from test_api import Serve, client

from medhead_app.service import Service

serve, real = test_api.serve, test_api.real  # fixtures


def test_a_text(serve: Serve, tokenizer: Any) -> None:
    engine = FakeEngine()
    programs = client(serve(engine))
    answer = programs.responses.create(
        model="tiny",
        input="Once",
        instructions="Be kind.",
        temperature=0.5,
        top_p=0.9,
        metadata={"run": "5"},
        store=False,
    )
    assert (answer.output_text, answer.status, answer.error) == ("Hello you", "completed", None)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"run": "5"}, "Be kind.", 0.5)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Once"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert engine.handles[0].request.prompt == prompt
    items: Any = [{"role": "user", "content": "Once"}, *(item.model_dump() for item in answer.output)]
    items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]})
    programs.responses.create(model="tiny", input=items)
    said = tokenizer.decode(engine.handles[1].request.prompt)
    assert [part in said for part in ("Once", "Hello you", "And?")] == [True] * 3


def test_events(serve: Serve) -> None:
    address = serve()
    events = list(client(address).responses.create(model="tiny", input="Once", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client(address).responses.stream(model="tiny", input="Once") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "Hello you"


def test_the_limit_and_the_real_engine(real: tuple[str, Service]) -> None:
    address, _ = real
    fields: Any = {"model": "tiny", "input": "Once upon a time", "temperature": 0, "max_output_tokens": 5}
    more: Any = {"extra_body": {"ignore_eos": True}}
    answer = client(address).responses.create(**fields, **more)
    plain = client(address).responses.create(**fields, extra_body={"ignore_eos": True, "proposer": "none"})
    assert answer.output_text == plain.output_text
    assert plain.usage.input_tokens_details.cached_tokens == plain.usage.input_tokens - 1
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    last = list(client(address).responses.create(stream=True, **fields, **more))[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == answer.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search", "name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),  # the template knows no tools
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"n": 2}, "n"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(serve: Serve, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{serve()}/v1/responses", json={"model": "tiny", "input": "Once"} | fields, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert "\n" not in error["message"]


def test_a_failure_is_an_event(serve: Serve) -> None:
    address = serve(FakeEngine(error="the device is gone"))
    last = list(client(address).responses.create(model="tiny", input="Once", stream=True))[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.message == "the device is gone"
    with pytest.raises(openai.InternalServerError, match="the device is gone"):
        client(address).responses.create(model="tiny", input="Once")
