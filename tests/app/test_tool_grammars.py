"""Grammars of tool calls: which answers they allow, with marks that are tokens and with marks that are text."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, hf
from test_tool_readers import written
from tokenizers import AddedToken
from tool_templates import TEMPLATES

from medhead.grammar import Grammar, compile_grammar
from medhead_app.api.errors import ApiError
from medhead_app.api.tools.answer import ToolAnswer
from medhead_app.api.tools.formats import find_format
from medhead_app.api.tools.plan import ToolPlan, ToolPlanner, new_tool_request
from medhead_app.api.tools.schema import Function, NamedChoice, Tool

FORMATS = ["hermes", "llama", "mistral", "named", "pythonic", "lfm2", "qwen3_coder"]
END = 1


def schema(name: str, values: list[Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"enum": values}}, "required": [name], "additionalProperties": False}


def tools(strict: bool) -> list[Tool]:
    functions = [("weather", "city", ["Oslo", "Rome"]), ("clock", "zone", [3])]
    return [
        Tool(type="function", function={"name": name, "parameters": schema(field, values), "strict": strict})  # type: ignore[arg-type]
        for name, field, values in functions
    ]


@pytest.fixture(scope="module", params=["tokens", "text"])
def tokenizer_of_marks(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    if request.param == "tokens":
        special = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call_start|>"]
        found.add_special_tokens({"additional_special_tokens": special})
        found.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>", "<think>")])
    return found


class Answers:
    """Says whether a request allows an answer."""

    def __init__(self, tokenizer: Any, template: str, strict: bool = False, **fields: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = TEMPLATES[template]
        fields = {"choice": "auto", "parallel": True, "answer": None} | fields
        wanted = new_tool_request(tools(strict), **fields)
        assert wanted is not None
        grammar = ToolPlanner(self.tokenizer).plan(wanted).grammar
        assert grammar is not None
        self.form = hf.from_tokenizer(self.tokenizer, n_vocab=len(self.tokenizer), eos_token=[END])
        self.source = compile_grammar(grammar.kind, grammar.text)

    def allow(self, text: str) -> bool:
        matcher = LLMatcher(self.form, self.source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


ONE: Any = [("weather", {"city": "Oslo"})]
OTHER: Any = [("clock", {"zone": 3})]
WRONG: Any = [("weather", {"city": "Bern"})]


def joined(template: str, calls: Any) -> str:
    """Return the calls in the form that the grammar asks for."""
    if template == "mistral":
        members = (json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls)
        return f"[TOOL_CALLS] [{', '.join(members)}]"
    text = written(template, calls).replace("[CALL_ID]abcdefghi", "")
    return text.replace("'", '"') if template in ("pythonic", "lfm2") else text


@pytest.mark.parametrize("template", FORMATS)
def test_what_is_allowed(tokenizer_of_marks: Any, template: str) -> None:
    one, other, wrong = (joined(template, calls) for calls in (ONE, OTHER, WRONG))
    both, parallel = joined(template, ONE + OTHER), template != "llama"
    said = "" if template in ("llama", "pythonic") else "Let me look. "

    must = Answers(tokenizer_of_marks, template, choice="required")
    cases = {one: True, other: True, both: parallel, wrong: False, "": False, "text": False, "text" + one: False}
    assert {text: must.allow(text) for text in cases} == cases

    named = Answers(tokenizer_of_marks, template, choice=NamedChoice(name="clock"), parallel=False)
    cases = {one: False, other: True, joined(template, OTHER * 2): False}
    assert {text: named.allow(text) for text in cases} == cases

    strict = Answers(tokenizer_of_marks, template, strict=True)
    cases = {"": True, "Hello, <b> [x] {": True, said + one: True, said + both: parallel, said + wrong: False}
    assert {text: strict.allow(text) for text in cases} == cases

    single = Answers(tokenizer_of_marks, template, parallel=False)
    cases = {"": True, "text\n": True, said + wrong: True, said + both: False}
    assert {text: single.allow(text) for text in cases} == cases

    answer = Answers(tokenizer_of_marks, template, answer=Grammar.json_schema(schema("kind", ["a"])))
    cases = {'{"kind": "a"}': True, '{"kind": "b"}': False, one: True, "text": False}
    assert {text: answer.allow(text) for text in cases} == cases

    person = {"type": "object", "properties": {"name": {"type": "string"}, "old": {"type": "boolean"}}}
    answer = Answers(tokenizer_of_marks, template, answer=Grammar.json_schema(person))
    cases = {'{"name": "weather", "old": true}': True, '{"name": "Ann"}': True, '{"old": 1}': False, one: True}
    assert {text: answer.allow(text) for text in cases} == cases


def test_free_text_may_have_other_added_tokens(tokenizer_of_marks: Any) -> None:
    answers = Answers(tokenizer_of_marks, "hermes", strict=True)
    assert answers.allow("<think>well</think> " + joined("hermes", ONE))


@pytest.mark.parametrize("template", FORMATS)
def test_the_template_names_the_format(template: str) -> None:
    names = {
        "hermes": "HermesReader", "llama": "Llama3Reader", "pythonic": "PythonicReader", "lfm2": "Lfm2Reader",
        "qwen3_coder": "Qwen3CoderReader",
    }  # fmt: skip
    found = find_format(TEMPLATES[template])
    assert found is not None
    assert found.reader.__name__ == names.get(template, "MistralReader")
    assert find_format(TEMPLATES["unknown"]) is None


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "where"},
        "color": {"$ref": "#/$defs/Color"},
        "days": {"type": "integer", "minimum": 1},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "exact": {"type": "boolean"},
        "place": schema("x", [1.5, None, "a"]),
    },
    "required": ["city", "days"],
    "$defs": {"Color": {"enum": ["red", "blue"], "type": "string"}},
}
RIGHT: list[dict[str, Any]] = [
    {"city": "Oslo", "days": 3},
    {"city": "", "days": 1, "exact": True},
    {"city": 'a "b"\\\n</p>\n', "color": "blue", "days": 12, "note": "x", "exact": False, "place": {"x": None}},
    {"city": "日本", "days": 3, "note": None, "place": {"x": "a"}},
]
FALSE: list[dict[str, Any]] = [
    {}, {"city": "Oslo"}, {"days": 3}, {"city": "Oslo", "days": 0}, {"city": "Oslo", "days": 1, "exact": 2},
    {"city": "Oslo", "color": "green", "days": 3}, {"city": "Oslo", "days": 3, "place": {}}, {"city": "Oslo", "days": 3, "z": 1},
]  # fmt: skip


def in_python(arguments: dict[str, Any]) -> str:
    shown = {key: json.dumps(value, ensure_ascii=False) for key, value in arguments.items()}
    shown |= {key: str(value) for key, value in arguments.items() if isinstance(value, bool)}
    return f"[f({', '.join(f'{key}={value}' for key, value in shown.items())})]"


def called_in(template: str, arguments: dict[str, Any]) -> str:
    return in_python(arguments) if template == "pythonic" else written(template, [("f", arguments)])


def constrained(tokenizer: Any, template: str, parameters: Any) -> ToolPlan:
    """Return the plan of a request that must call `f`."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = TEMPLATES[template]
    wanted = new_tool_request(
        [Tool(type="function", function=Function(name="f", parameters=parameters))], "required", False, None
    )
    assert wanted is not None
    return ToolPlanner(found).plan(wanted)


def arguments_of(plan: ToolPlan, text: str) -> Any:
    answer = ToolAnswer(plan)
    answer.add(text)
    return json.loads(answer.calls[0]["function"]["arguments"])


@pytest.mark.parametrize("template", ["pythonic", "qwen3_coder"])
def test_calls_that_are_no_json_follow_the_schema(tokenizer_of_marks: Any, template: str) -> None:
    plan = constrained(tokenizer_of_marks, template, PARAMETERS)
    assert plan.grammar is not None
    answers = Answers(tokenizer_of_marks, template, choice="required")
    answers.source = compile_grammar(plan.grammar.kind, plan.grammar.text)
    texts = [called_in(template, arguments) for arguments in RIGHT]
    assert [text for text in texts if not answers.allow(text)] == []
    assert [arguments_of(plan, text) for text in texts] == RIGHT
    assert [arguments for arguments in FALSE if answers.allow(called_in(template, arguments))] == []
    draws, allowed = random.Random(0), 0
    pieces = [*"\\'\"/n0-.,=()[]<>\n x", "None", "null", "\\u0041", "</", "\\/"]
    for _ in range(100):  # what the grammar allows of other texts is read as arguments of the schema too
        text = draws.choice(texts)
        start = draws.randrange(len(text))
        text = text[:start] + draws.choice(pieces) + text[start + draws.randrange(3) :]
        if answers.allow(text):
            jsonschema.validate(arguments_of(plan, text), PARAMETERS)
            allowed += 1
    assert allowed > 5


@pytest.mark.parametrize(
    ("template", "parameters"),
    [
        ("pythonic", {"type": "object", "properties": {"a-b": {}}}),
        ("qwen3_coder", {"type": "object", "properties": {"a b": {}}}),
        ("qwen3_coder", {"type": "object", "properties": {"a": {"enum": ["1", 1]}}}),
        ("qwen3_coder", {"type": "object", "properties": {"a": {"enum": ["x</parameter>"]}}}),
        ("qwen3_coder", {"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}}),
        ("qwen3_coder", {"type": "object", "properties": {"a": {"type": ["string", "integer"], "minimum": 3}}}),
        *[
            (template, {"type": "object", **fields})
            for template in ("pythonic", "qwen3_coder")
            for fields in (
                {"properties": {"a": {}}, "required": ["a"], "minProperties": 1},
                {"properties": {"a": False}},
                {"required": ["a"]},
                {"additionalProperties": {"type": "integer"}},
                {"properties": {"a": {"$ref": "#"}}},
            )
        ],
    ],
)
def test_what_cannot_be_constrained_is_refused(tokenizer: Any, template: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r"calls of f cannot be constrained .*hermes, llama3_json and mistral"):
        constrained(tokenizer, template, parameters)
