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
from medhead_app.api.tools.reader import ToolReader

READERS: list[type[ToolReader]] = [HermesReader, Llama3Reader, MistralReader]
PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool", "[", "]", "{", "}",
    '{"name": "f", ', '"arguments": ', '"parameters": ', '{"a": "}\\""}', '"name": "g"', '"id": 7', ": ", ", ", ";", '"', "\\",
    " ", "\n", "f", "text", "null", "日",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["</tool_call>", '"}]', "\\"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.dictionaries(st.text(max_size=4), JSON, max_size=2)),
    min_size=1,
    max_size=3,
)
Read = tuple[str, list[tuple[str, str]]]


def read(kind: type[ToolReader], pieces: list[str]) -> Read:
    """Return the content and the calls of a text that comes in pieces."""
    reader = kind(["f", "g"])
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


def written(kind: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as a model of this kind writes them."""
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
    ],
)
def test_what_models_also_write(reader: type[ToolReader], text: str, expected: Read) -> None:
    assert read(reader, [text]) == expected
