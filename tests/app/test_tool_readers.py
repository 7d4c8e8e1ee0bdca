"""Readers of tool calls: any split of a text gives the same result, and well-formed calls are read as they were written."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medhead_app.api.tools.hermes import HermesReader
from medhead_app.api.tools.llama3 import Llama3Reader
from medhead_app.api.tools.mistral import MistralReader
from medhead_app.api.tools.pythonic import Lfm2Reader, PythonicReader
from medhead_app.api.tools.qwen3_coder import Qwen3CoderReader
from medhead_app.api.tools.reader import ToolReader

READERS: list[type[ToolReader]] = [
    HermesReader, Llama3Reader, MistralReader, PythonicReader, Lfm2Reader, Qwen3CoderReader,
]  # fmt: skip
PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool", "[", "]", "{", "}",
    '{"name": "f", ', '"arguments": ', '"parameters": ', '{"a": "}\\""}', '"name": "g"', '"id": 7', ": ", ", ", ";", '"', "\\",
    " ", "\n", "f", "text", "null", "日", "<|python_start|>", "<|tool_call_start|>", "[f(", "g(a=", "a", "=", "(", ")", "'",
    "-1.5", "\\u00e9", "True", "<function=f>", "<parameter=a>", "<parameter=n>", "</parameter>", "</function>", "<", ">",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["</tool_call>", '"}]', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def calls_of(arguments: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[tuple[str, dict[str, Any]]]]:
    return st.lists(st.tuples(st.sampled_from(["f", "g"]), arguments), min_size=1, max_size=3)


CALLS = calls_of(st.dictionaries(st.text(max_size=4), JSON, max_size=2))
NAMED = calls_of(
    st.dictionaries(st.sampled_from(["a", "b_1", "städte"]), JSON | st.floats(allow_nan=False, allow_infinity=False))
)
TYPES: dict[str, Any] = {
    "a": {"type": "string"}, "n": {"$ref": "#/$defs/number"}, "b": {"type": "boolean"}, "list": {"type": "array"},
    "o": {"type": ["object", "null"]}, "s": {"type": ["string", "null"]},
    "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
}  # fmt: skip
SCHEMA = {"type": "object", "properties": TYPES, "$defs": {"number": {"type": "integer"}}}
SCHEMAS: dict[str, dict[str, Any]] = {"f": SCHEMA, "g": SCHEMA}
RAW = st.text(max_size=6) | st.sampled_from(
    ["\n", "\n\na\n", "<parameter=a>", "\n</function>", "</parameter", "5", "null", '"']
)
TYPED = calls_of(
    st.fixed_dictionaries(
        {},
        optional={
            "a": RAW,
            "n": st.integers(),
            "b": st.booleans(),
            "list": st.lists(JSON, max_size=2),
            "unknown": RAW,
            "o": st.none() | st.dictionaries(st.text(max_size=3), JSON, max_size=2),
            "maybe": st.none() | st.floats(-1e9, 1e9),
        },
    )
)
Read = tuple[str, list[tuple[str, str]]]


def read(kind: type[ToolReader], pieces: list[str]) -> Read:
    """Return the content and the calls of a text that comes in pieces."""
    reader = kind(SCHEMAS)
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.call == len(calls)
            calls.append((delta.name, ""))
        if delta.call is not None:
            assert delta.call == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + delta.text
    return "".join(delta.text for delta in deltas if delta.call is None), calls


@pytest.mark.parametrize("kind", READERS)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14), cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_split_gives_the_same_result(kind: type[ToolReader], pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    split = [text[one:other] for one, other in pairwise(places)]
    whole = read(kind, [text])
    assert read(kind, split) == read(kind, list(text)) == read(kind, pieces) == whole
    if not whole[1]:
        assert whole[0] == text  # nothing of a text without calls is lost


def tagged(call: tuple[str, dict[str, Any]]) -> str:
    """Return a call as the chat template of Qwen3-Coder writes it: constants as in Python, lists and objects as JSON."""
    text = f"<tool_call>\n<function={call[0]}>\n"
    for name, value in call[1].items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        text += f"<parameter={name}>\n{shown}\n</parameter>\n"
    return f"{text}</function>\n</tool_call>"


def written(kind: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as a model of this kind writes them."""
    if kind in ("pythonic", "lfm2"):
        lists = ", ".join(f"{n}({', '.join(f'{key}={value!r}' for key, value in a.items())})" for n, a in calls)
        return f"{'<|tool_call_start|>' if kind == 'lfm2' else ''}[{lists}]"
    if kind == "qwen3_coder":
        return "\n".join(map(tagged, calls))
    texts = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    if kind == "hermes":
        return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in texts)
    if kind == "llama":
        return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in texts)
    if kind == "mistral":
        members = (f'{{"arguments": {a}, "id": "abcdefghi", "name": "{n}"}}' for n, a in texts)
        return f"[TOOL_CALLS] [{', '.join(members)}]"
    return "".join(f"[TOOL_CALLS]{n}[CALL_ID]abcdefghi[ARGS]{a}" for n, a in texts)


@pytest.mark.parametrize(
    ("kind", "reader"),
    [("hermes", HermesReader), ("llama", Llama3Reader), ("mistral", MistralReader), ("named", MistralReader)],
)
@given(calls=CALLS, said=st.sampled_from(["", "Let me look. "]))
def test_calls_are_read_as_they_were_written(
    kind: str, reader: type[ToolReader], calls: list[tuple[str, dict[str, Any]]], said: str
) -> None:
    said = "" if kind == "llama" else said
    content, found = read(reader, list(said + written(kind, calls)))
    assert content == said.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(("kind", "reader"), [("pythonic", PythonicReader), ("lfm2", Lfm2Reader)])
@given(calls=NAMED, said=st.sampled_from(["", "Let me look. "]))
def test_python_calls_are_read_as_they_were_written(
    kind: str, reader: type[ToolReader], calls: list[tuple[str, dict[str, Any]]], said: str
) -> None:
    said = "" if kind == "pythonic" else said
    content, found = read(reader, list(said + written(kind, calls)))
    assert content == said.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(calls=TYPED, said=st.sampled_from(["", "Let me look. "]))
def test_tagged_calls_are_read_as_they_were_written(calls: list[tuple[str, dict[str, Any]]], said: str) -> None:
    content, found = read(Qwen3CoderReader, list(said + written("qwen3_coder", calls)))
    assert content == said.rstrip()
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (PythonicReader, "[f(a='He said \"\\x41\\n\"', b=[1, {'c': None}]), g()]"),
        (Qwen3CoderReader, tagged(("f", {"a": "x\n</p", "n": -3, "b": True, "o": {"k": [1]}}))),
    ],
)
def test_every_cut_gives_the_same_result(kind: type[ToolReader], text: str) -> None:
    whole = read(kind, [text])
    assert len(whole[1]) in (1, 2)
    for one in range(len(text)):
        for other in range(one, len(text)):
            assert read(kind, [text[:one], text[one:other], text[other:]]) == whole


@pytest.mark.parametrize(
    ("kind", "text"), [(PythonicReader, "[f(a='"), (Qwen3CoderReader, "<tool_call><function=f><parameter=a>")]
)
def test_characters_of_a_string_come_at_once(kind: type[ToolReader], text: str) -> None:
    reader = kind(SCHEMAS)
    reader.feed(text)
    assert [delta.text for char in "Paris" for delta in reader.feed(char)] == list("Paris")


@pytest.mark.parametrize(
    ("reader", "text", "expected"),
    [
        (HermesReader, '<tool_call>{"name": "f"}</tool_call> done', (" done", [("f", "{}")])),
        (HermesReader, '<tool_call>{"name": "f", "arguments": null}', ("", [("f", "{}")])),
        (HermesReader, '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', ("", [("f", '{"a": 1}')])),
        (HermesReader, '<tool_call>{"name":"f","arguments":{"a": 1</tool_call> b', (" b", [("f", '{"a": 1')])),
        (
            HermesReader,
            '<tool_call>{"name":"f","arguments":{}}<tool_call>{"name":"g"}',
            ("", [("f", "{}"), ("g", "{}")]),
        ),
        (HermesReader, "a <tool_call>no JSON</tool_call>", ("a <tool_call>no JSON</tool_call>", [])),
        (Llama3Reader, '{"name": "Ann", "parameters": {}}', ('{"name": "Ann", "parameters": {}}', [])),
        (Llama3Reader, '<|python_tag|>{"name": "h", "parameters": {}}', ("", [("h", "{}")])),
        (Llama3Reader, '{"type": "function", "name": "f", "parameters": {"a": 1}}', ("", [("f", '{"a": 1}')])),
        (Llama3Reader, 'As {"name": "f", "parameters": {}}', ('As {"name": "f", "parameters": {}}', [])),
        (MistralReader, '[TOOL_CALLS]f{"a": 1}', ("", [("f", '{"a": 1}')])),
        (MistralReader, '[TOOL_CALLS]f[ARGS]{"a": ', ("", [("f", '{"a": ')])),
        (PythonicReader, "[Ann(a=1)]", ("[Ann(a=1)]", [])),
        (PythonicReader, "<|python_start|>[h()]<|python_end|>", ("<|python_end|>", [("h", "{}")])),
        (PythonicReader, "[f(x)](y)", ("[f(x)](y)", [])),
        (PythonicReader, "[1, 2]", ("[1, 2]", [])),
        (PythonicReader, "As [f(a=1)]", ("As [f(a=1)]", [])),
        (PythonicReader, " [ f ( a = true , b = [1,] , ) , ]", ("", [("f", '{"a": true, "b": [1]}')])),
        (PythonicReader, '[f(a="""x""")]', ("", [("f", '{"a": "x"}')])),
        (PythonicReader, "[f(a={1: 'x', None: +1_0})]", ("", [("f", '{"a": {"1": "x", "null": 10}}')])),
        (PythonicReader, "[f(a='\\ud83d\\ude00\\/\\q')]", ("", [("f", '{"a": "\\ud83d\\ude00/\\\\q"}')])),
        (PythonicReader, "[f(a=1, b=inf)] done", (")] done", [("f", '{"a": 1, "b": ')])),
        (PythonicReader, "[f(a='x", ("", [("f", '{"a": "x')])),
        (Qwen3CoderReader, "<tool_call><function=f></function></tool_call> done", (" done", [("f", "{}")])),
        (Qwen3CoderReader, "<tool_call><function=f><parameter=n>5</parameter></function>", ("", [("f", '{"n": 5}')])),
        (Qwen3CoderReader, "<tool_call><function=f><parameter=n>five</parameter>", ("", [("f", '{"n": "five"')])),
        (Qwen3CoderReader, "<tool_call><function=f><parameter=b>false</parameter>", ("", [("f", '{"b": false')])),
        (
            Qwen3CoderReader,
            "<tool_call><function=f><parameter=list>['a', None]</parameter>",
            ("", [("f", '{"list": ["a", null]')]),
        ),
        (Qwen3CoderReader, "<tool_call><function=h><parameter=x>1</parameter></function>", ("", [("h", '{"x": "1"}')])),
        (Qwen3CoderReader, '<tool_call><function=f><parameter=s>"x"</parameter>', ("", [("f", '{"s": "\\"x\\""')])),
        (Qwen3CoderReader, "<tool_call><function=f>no</tool_call> b", (" b", [("f", "{")])),
        (Qwen3CoderReader, '<tool_call>{"name": "f"}</tool_call>', ('<tool_call>{"name": "f"}</tool_call>', [])),
    ],
)
def test_what_models_also_write(reader: type[ToolReader], text: str, expected: Read) -> None:
    assert read(reader, [text]) == expected
