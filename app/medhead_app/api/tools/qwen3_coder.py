"""The format of Qwen3-Coder: `<tool_call>` and `</tool_call>` around a function and its parameters as tags."""

from __future__ import annotations

import json
import re
from typing import Any

from medhead_app.api.tools.grammar import CallGrammar, json_rule, quoted
from medhead_app.api.tools.hermes import BEGIN, END, HermesReader
from medhead_app.api.tools.parameters import (
    NOTES,
    Parameter,
    alternatives,
    listed_values,
    not_constrained,
    parameters_of,
    types_of,
)
from medhead_app.api.tools.xml_call import END_CALL, END_VALUE, FUNCTION, PARAMETER, XmlCall, converted

_TEXT = ("text_value[lazy]", rf"/(.|\n)*{re.escape(END_VALUE)}/".replace("</", r"<\/"))  # rule of any text and its end
_END = quoted(f"\n{END_VALUE}\n")


class Qwen3CoderReader(HermesReader):
    """Reads calls of the form `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

    def _after_marker(self, char: str) -> None:
        self._tail = ""
        self._begin_call(XmlCall(self.schemas), char)


def qwen3_coder_calls(grammar: CallGrammar) -> str:
    """Return the rule of calls in the form that models are trained to write; values other than strings are JSON."""
    for index, (name, schema) in enumerate(grammar.tools):
        grammar.add(f"arguments_{index}", _arguments(grammar, index, name, parameters_of(name, schema)))
    heads = [quoted(f"\n{FUNCTION}{name}>\n") for name in grammar.names]
    grammar.add("call", f"{grammar.either(heads)} {quoted(f'{END_CALL}{chr(10)}')} {grammar.token(END)}")
    first = f"{grammar.lead(BEGIN)} call"
    return f"{first} {grammar.repeated(first if grammar.free else quoted(chr(10)) + ' ' + first)}"


def _arguments(grammar: CallGrammar, index: int, function: str, parameters: list[Parameter] | None) -> str:
    """Return the rule of the arguments of a function, in the order of its parameters."""
    if parameters is None:
        grammar.add(*_TEXT)
        grammar.add("KEY", r"/[^<>\s]+/")
        return f'({quoted(PARAMETER)} KEY ">\\n" text_value "\\n")*'
    rules = []
    for place, one in enumerate(parameters):
        if not re.fullmatch(r"[^<>\s]+", one.name):
            raise not_constrained(function, f"the name {one.name!r} has white space, '<' or '>'")
        rule = (
            f"{quoted(f'{PARAMETER}{one.name}>{chr(10)}')} {_value(grammar, f'value_{index}_{place}', function, one)}"
        )
        rules.append(rule if one.required else f"({rule})?")
    return " ".join(rules) or '""'


def _value(grammar: CallGrammar, rule: str, function: str, parameter: Parameter) -> str:
    """Return the rule of a value and the end of its parameter."""
    types, listed = types_of(parameter.schema), _listed(parameter.schema)
    if listed is not None:
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in listed]
        for text, value in zip(texts, listed, strict=True):
            if END_VALUE in text or json.loads(converted(text, types)) != value:
                raise not_constrained(function, f"{text[:80]!r} of {parameter.name!r} would be read as another value")
        return f"({' | '.join(quoted(text) for text in texts)}) {_END}"
    if parameter.is_free and (not types or "string" in types):
        grammar.add(*_TEXT)
        return 'text_value "\\n"'
    if not types or "string" in types:
        raise not_constrained(function, f"{parameter.name!r} is a text, and its schema says more than its type or enum")
    if parameter.is_free and types == {"boolean"}:
        return f'("true" | "false" | "True" | "False") {_END}'
    grammar.add(rule, json_rule(parameter.schema))
    return f"{rule} {_END}"


def _listed(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values that a schema lists, None where it says anything else."""
    found = []
    for one in alternatives(schema):
        values = listed_values(one)
        if values is None or set(one) - {"enum", "const", "type", *NOTES}:
            return None
        if one.get("type") not in (None, *types_of({"enum": values})):
            return None
        found += values
    return found
