"""Tools of chats, by the official client: what the model writes is read as calls, and what must be a call is constrained."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Literal

import httpx
import openai
import pytest
import test_api
from app_engine import FakeEngine
from pydantic import BaseModel
from test_api import client
from test_tool_readers import written
from tokenizers import AddedToken
from tool_templates import TEMPLATES

from conftest import tiny_llama
from medhead import Decoder
from medhead.serving import Engine
from medhead_app.api.tools.parsers import PARSERS
from medhead_app.listen import run_in_thread
from medhead_app.server import build_app
from medhead_app.service import Service

MESSAGES = test_api.MESSAGES
FORMATS = ["hermes", "llama", "mistral", "named", "pythonic", "qwen3_coder"]
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"]


class Weather(BaseModel):
    """Return the weather of a city."""

    city: Literal["Oslo", "Rome"]
    today: bool


def tool(name: str, strict: bool = False, **properties: Any) -> Any:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS: Any = [
    tool("weather", city={"enum": ["Oslo", "Rome"]}),
    tool("clock", zone={"type": "integer", "minimum": 0, "maximum": 9}),
]


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Any:
    """A tokenizer in which the marks of calls are tokens, those of Hermes ordinary ones, as in Qwen's."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])  # as Mistral's, not named
    found.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    return found


def with_template(tokenizer: Any, name: str) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATES[name]
    return found


@pytest.fixture
def chat(tokens: Any) -> Iterator[Any]:
    """Start a server whose model writes these texts; return its client and its engine."""
    with ExitStack() as stack:

        def start(template: str, *outputs: str, **options: Any) -> tuple[openai.OpenAI, FakeEngine]:
            engine = FakeEngine(outputs=outputs or ("ok",))
            engine.decoder.target.context = 4096
            service = Service(engine.start(), with_template(tokens, template), "tiny", **options)  # type: ignore[arg-type]
            return client(stack.enter_context(run_in_thread(build_app(service), service))), engine

        yield start


@pytest.fixture(scope="module")
def real(tokens: Any) -> Iterator[dict[str, openai.OpenAI]]:
    """Serve a random model, by a server for every format."""
    model = tiny_llama(vocab=len(tokens), context=2048, eos_token_id=1, bos_token_id=None)
    engine = Engine(Decoder(model, "ngram", tree_size=8), tokens, max_rows=4).start()
    with ExitStack() as stack:
        clients = {}
        for name in FORMATS:
            service = Service(engine, with_template(tokens, name), "tiny")
            clients[name] = client(stack.enter_context(run_in_thread(build_app(service), service)))
        yield clients


def called(message: Any) -> list[tuple[str, Any]]:
    return [(one.function.name, json.loads(one.function.arguments)) for one in message.tool_calls or []]


def streamed(programs: openai.OpenAI, **fields: Any) -> tuple[str, list[dict[str, str]], list[str]]:
    """Return content, calls and finish reasons of a stream."""
    content, calls, reasons = "", list[dict[str, str]](), []
    for chunk in programs.chat.completions.create(model="tiny", stream=True, **fields):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.index == len(calls):
                assert call.type == "function"
                calls.append({"id": call.id or "", "name": call.function.name or "", "arguments": ""})
            else:
                assert (call.id, call.function.name) == (None, None)
            calls[call.index]["arguments"] += call.function.arguments or ""
    return content, calls, reasons


# ---------------------------------------------------------------- what the model writes


@pytest.mark.parametrize("template", FORMATS)
def test_calls_whole_and_streamed(chat: Any, template: str) -> None:
    calls = [("weather", {"city": "Oslo"}), ("clock", {"zone": 3})]
    text = written(template, calls)
    said = "" if template in ("llama", "pythonic") else "Let me look.\n"
    pieces = [said, *(text[start : start + 7] for start in range(0, len(text), 7))]
    programs, _ = chat(template, *pieces)
    choice = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == (said.rstrip() or None)
    assert called(choice.message) == calls
    content, found, reasons = streamed(programs, messages=MESSAGES, tools=TOOLS)
    assert (content, reasons) == (said.rstrip(), ["tool_calls"])
    assert [(one["name"], json.loads(one["arguments"])) for one in found] == calls
    ids = [one["id"] for one in found]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() if template in ("mistral", "named") else one for one in ids)


def test_arguments_stream_in_pieces(chat: Any) -> None:
    programs, _ = chat("hermes", *written("hermes", [("weather", {"city": "a long name of a city"})]))
    chunks = list(programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, stream=True))
    assert sum(bool(chunk.choices[0].delta.tool_calls) for chunk in chunks) > 10


def test_text_without_calls_is_content(chat: Any) -> None:
    programs, engine = chat("hermes", "Hel", "lo <b", "> ")
    choice = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("Hello <b> ", None, "stop")
    assert streamed(programs, messages=MESSAGES, tools=TOOLS) == ("Hello <b> ", [], ["stop"])
    assert engine.handles[0].request.params.grammar is None  # free text is free


def test_every_choice_has_its_own_calls(chat: Any) -> None:
    programs, _ = chat("hermes", *written("hermes", [("clock", {"zone": 1})]))
    choices = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, n=2).choices
    assert [called(choice.message) for choice in choices] == [[("clock", {"zone": 1})]] * 2


def test_with_none_a_call_is_content_and_the_prompt_has_no_tools(chat: Any, tokens: Any) -> None:
    text = written("hermes", [("clock", {"zone": 1})])
    programs, engine = chat("hermes", text)
    choice = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none").choices[
        0
    ]
    assert (choice.message.content, choice.message.tool_calls) == (text, None)
    assert "weather" not in tokens.decode(engine.handles[0].request.prompt)


def test_the_template_gets_tools_calls_and_results(chat: Any, tokens: Any) -> None:
    programs, engine = chat("hermes", *written("hermes", [("weather", {"city": "Rome"})]))
    first = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0].message
    call_id = first.tool_calls[0].id
    result = {"role": "tool", "tool_call_id": call_id, "content": [{"type": "text", "text": "12 degrees"}]}
    programs.chat.completions.create(model="tiny", messages=[*MESSAGES, first, result], tools=TOOLS)
    prompt = tokens.decode(engine.handles[1].request.prompt)
    shown = [json.loads(json.dumps(TOOLS[0]))["function"] | {"strict": None}]
    assert json.dumps({"name": "weather", "arguments": {"city": "Rome"}}) in prompt  # an object, not its text
    assert f"[tool {call_id}] 12 degrees" in prompt
    assert json.dumps(shown[0]["parameters"]) in prompt
    assert "strict" not in prompt


# ---------------------------------------------------------------- constrained calls


@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
def test_calls_that_must_be_are_constrained(real: dict[str, openai.OpenAI], template: str, choice: Any) -> None:
    fields: Any = {
        "model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False,
        "temperature": 1.0,
    }  # fmt: skip
    names = set()
    for seed in range(2):
        found = real[template].chat.completions.create(**fields, seed=seed).choices[0]
        plain = real[template].chat.completions.create(**fields, seed=seed, extra_body={"proposer": "none"}).choices[0]
        assert found.finish_reason == "tool_calls", found
        assert found.message.content is None
        ((name, arguments),) = called(found.message)
        assert called(plain.message) == [(name, arguments)]
        names.add(name)
        if name == "weather":
            assert arguments in ({"city": "Oslo"}, {"city": "Rome"})
        else:
            assert arguments in [{"zone": zone} for zone in range(10)]
    assert names <= ({"weather", "clock"} if choice == "required" else {"clock"})


@pytest.mark.parametrize("template", ["hermes", "mistral", "named", "qwen3_coder"])
def test_several_calls_that_must_be(real: dict[str, openai.OpenAI], template: str) -> None:
    fields: Any = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 150, "seed": 1}
    _, calls, reasons = streamed(real[template], logit_bias={"1": -100}, **fields)  # the model does not end
    assert reasons == ["length"]
    assert len(calls) > 1
    for call in calls[:-1]:
        assert json.loads(call["arguments"]) in [{"city": "Oslo"}, {"city": "Rome"}, *({"zone": n} for n in range(10))]


@pytest.mark.parametrize("template", ["hermes", "named", "qwen3_coder"])
def test_strict_tools_are_constrained_in_free_text_too(
    real: dict[str, openai.OpenAI], tokens: Any, template: str
) -> None:
    marker = tokens.convert_tokens_to_ids("[TOOL_CALLS]" if template == "named" else "<tool_call>")
    strict = [tool("weather", True, city={"enum": ["Oslo", "Rome"]})]
    fields: Any = {"model": "tiny", "messages": MESSAGES, "tools": strict, "temperature": 1.0, "max_tokens": 100}
    fields |= {"logit_bias": {str(marker): 100}, "parallel_tool_calls": False}  # the model begins a call where it may
    for seed in range(2):
        found = real[template].chat.completions.create(**fields, seed=seed).choices[0]
        plain = real[template].chat.completions.create(**fields, seed=seed, extra_body={"proposer": "none"}).choices[0]
        assert [name for name, _ in called(found.message)] == ["weather"]
        assert called(found.message)[0][1]["city"] in ("Oslo", "Rome")
        assert called(plain.message) == called(found.message)
    del fields["logit_bias"]
    free = real[template].chat.completions.create(**fields, seed=1).choices[0]
    assert free.message.content  # text is still free


def allowed(mode: str, *names: str) -> Any:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools_that_must_be_called(real: dict[str, openai.OpenAI]) -> None:
    more = [*TOOLS, tool("light", on={"type": "boolean"})]
    fields: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": more,
        "parallel_tool_calls": False,
        "temperature": 1.0,
    }
    names = set()
    for seed in range(4):
        choice = allowed("required", "light", "clock")
        found = real["hermes"].chat.completions.create(**fields, tool_choice=choice, seed=seed).choices[0]
        assert found.finish_reason == "tool_calls"
        names |= {name for name, _ in called(found.message)}
    assert names == {"clock", "light"}


def test_allowed_tools_of_free_text(chat: Any, real: dict[str, openai.OpenAI], tokens: Any) -> None:
    programs, engine = chat("hermes", "ok")
    ask = programs.chat.completions.create
    ask(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=allowed("auto", "clock"))
    ask(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=allowed("auto", "weather", "clock"))
    one, every = (handle.request for handle in engine.handles)
    assert one.prompt == every.prompt  # the model is shown all tools, so that the prefix stays
    assert every.params.grammar is None
    begin = str(tokens.convert_tokens_to_ids("<tool_call>"))
    fields: Any = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 60, "temperature": 1.0}
    fields |= {"logit_bias": {begin: 100}, "tool_choice": allowed("auto", "clock")}
    for seed in range(2):
        found = real["hermes"].chat.completions.create(model="tiny", **fields, seed=seed).choices[0].message
        assert {call.function.name for call in found.tool_calls or []} == {"clock"}


def test_allowed_tools_of_responses(real: dict[str, openai.OpenAI]) -> None:
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    fields: Any = {"model": "tiny", "input": "Once", "tools": flat(TOOLS), "parallel_tool_calls": False}
    answer = real["hermes"].responses.create(**fields, tool_choice=choice)
    assert [item.name for item in answer.output if item.type == "function_call"] == ["clock"]
    assert answer.tool_choice.model_dump() == choice  # type: ignore[union-attr]


def test_schemas_that_a_format_cannot_constrain_are_refused(chat: Any) -> None:
    programs, engine = chat("qwen3_coder")
    fields: Any = {"model": "tiny", "messages": MESSAGES, "tools": [tool("f", a={"type": "string", "pattern": "a+"})]}
    with pytest.raises(openai.BadRequestError, match=r"calls of f .*'a'.*hermes, llama3_json and mistral") as refused:
        programs.chat.completions.create(**fields, tool_choice="required")
    assert refused.value.param == "tools"
    programs.chat.completions.create(**fields)
    assert len(engine.handles) == 1


def test_parse_of_the_official_client(real: dict[str, openai.OpenAI]) -> None:
    class Answer(BaseModel):
        kind: bool

    fields: Any = {"model": "tiny", "messages": MESSAGES, "seed": 3}
    parsed = real["hermes"].chat.completions.parse(**fields, response_format=Answer).choices[0].message.parsed
    assert isinstance(parsed, Answer)
    fields |= {"tools": [openai.pydantic_function_tool(Weather, name="weather")], "parallel_tool_calls": False}
    for more in ({"tool_choice": "required"}, {"tool_choice": "required", "response_format": Answer}):
        choice = real["hermes"].chat.completions.parse(**fields, **more).choices[0]
        assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Weather)
        messages: Any = [*MESSAGES, choice.message]
        real["hermes"].chat.completions.create(model="tiny", messages=messages, max_tokens=1)  # as it came
    message = real["hermes"].chat.completions.parse(**fields, response_format=Answer).choices[0].message
    assert isinstance(message.parsed, Answer) or [name for name, _ in called(message)] == ["weather"]
    real["hermes"].chat.completions.create(model="tiny", messages=[*MESSAGES, message], max_tokens=1)
    with real["hermes"].chat.completions.stream(**fields, tool_choice="required") as stream:
        final = stream.get_final_completion().choices[0].message
    assert isinstance(final.tool_calls[0].function.parsed_arguments, Weather)


# ---------------------------------------------------------------- responses


def flat(tools: Any) -> Any:
    return [{"type": "function", **one["function"]} for one in tools]


def test_calls_of_responses_whole_and_streamed(chat: Any, tokens: Any) -> None:
    text = "Let me look.\n" + written("hermes", [("weather", {"city": "Oslo"}), ("clock", {"zone": 3})])
    programs, engine = chat("hermes", *(text[start : start + 9] for start in range(0, len(text), 9)))
    fields: Any = {"model": "tiny", "input": "Once", "tools": flat(TOOLS)}
    answer = programs.responses.create(**fields)
    said, *calls = answer.output
    assert (answer.output_text, said.type, answer.status) == ("Let me look.", "message", "completed")
    found = [(call.name, json.loads(call.arguments)) for call in calls]
    assert found == [("weather", {"city": "Oslo"}), ("clock", {"zone": 3})]
    events = list(programs.responses.create(**fields, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done", "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 3
    with programs.responses.stream(**fields) as stream:
        last = stream.get_final_response()
    assert [(one.name, json.loads(one.arguments)) for one in last.output if one.type == "function_call"] == found
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": f"of {call.name}"} for call in calls]
    said_before = {"role": "user", "content": "Once"}
    programs.responses.create(model="tiny", input=[said_before, *answer.output, *results], tools=flat(TOOLS))
    prompt = tokens.decode(engine.handles[-1].request.prompt)
    assert f"[tool {calls[0].call_id}] of weather" in prompt
    assert prompt.count("[assistant]") == 3  # the text, the calls, and where the answer begins


def test_calls_of_responses_are_constrained(real: dict[str, openai.OpenAI]) -> None:
    fields: Any = {"model": "tiny", "input": "Once", "tools": flat(TOOLS), "parallel_tool_calls": False}
    choice: Any = {"type": "function", "name": "clock"}
    (call,) = real["hermes"].responses.create(**fields, tool_choice=choice).output
    assert call.type == "function_call"
    assert json.loads(call.arguments) in [{"zone": zone} for zone in range(10)]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f" * 65}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("f") | {"function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [TOOLS[0], tool("f", True, a={"type": "odd"})]}, "tools[1].function.parameters"),
        ({"tools": [tool("f", a={"type": "odd"})], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "clock", "h")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("none", "clock")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": 5}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": [], "tools": [{}]}}, "tool_choice"),
        ({"tool_choice": allowed("auto", "clock")}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": TOOLS, "guided_regex": "a+"}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_wrong_tools_are_refused_by_name(chat: Any, fields: dict[str, Any], param: str) -> None:
    programs, engine = chat("hermes")
    response = httpx.post(f"{programs.base_url}chat/completions", json={"model": "tiny", "messages": MESSAGES} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert "\n" not in error["message"]
    assert param in error["message"]
    assert engine.handles == []


@pytest.mark.parametrize(("template", "says"), [("none", "knows no tools"), ("unknown", "--tool-parser")])
def test_a_model_without_tools_refuses_them(chat: Any, template: str, says: str) -> None:
    programs, _ = chat(template)
    with pytest.raises(openai.BadRequestError, match=says) as refused:
        programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS)
    assert refused.value.param == "tools"
    programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice="none")


def test_messages_of_tools_need_a_template_that_knows_them(chat: Any) -> None:
    programs, _ = chat("none")
    result: Any = {"role": "tool", "content": "x", "tool_call_id": "a"}
    with pytest.raises(openai.BadRequestError, match="knows no tools") as refused:
        programs.chat.completions.create(model="tiny", messages=[*MESSAGES, result])
    assert refused.value.param == "messages"


@pytest.mark.parametrize("parser", PARSERS)
def test_every_format_has_a_name(chat: Any, parser: str) -> None:
    written_as = {"llama3_json": "llama"}.get(parser, parser)
    programs, _ = chat("unknown", *written(written_as, [("clock", {"zone": 1})]), tool_parser=parser)
    choice = programs.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS).choices[0]
    assert called(choice.message) == [("clock", {"zone": 1})]
