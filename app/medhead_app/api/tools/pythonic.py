"""The format of Llama 3.2 and 4 and others: the whole answer is a list of calls as in Python, `[name(key=value), ...]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from medhead_app.api.tools.grammar import CallGrammar, json_rule, quoted
from medhead_app.api.tools.json_call import SPACE
from medhead_app.api.tools.parameters import Parameter, not_constrained, parameters_of, types_of
from medhead_app.api.tools.python_call import PythonCall
from medhead_app.api.tools.reader import ToolReader

TAG = "<|python_start|>"
LFM2_TAG = "<|tool_call_start|>"
_ANY = {  # rules of any arguments
    "any_arguments": '(any_pair (", " any_pair)*)?',
    "any_pair": 'ANY_KEY "=" any_value',
    "any_value": "ANY_STRING | ANY_WORD | any_list | any_dictionary",
    "any_list": '"[" (any_value (", " any_value)*)? "]"',
    "any_dictionary": '"{" (any_member (", " any_member)*)? "}"',
    "any_member": 'ANY_STRING ": " any_value',
    "ANY_KEY": "/[A-Za-z_][A-Za-z_0-9]*/",
    "ANY_WORD": r"/True|False|None|true|false|null|-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?(e[+-]?[0-9]{1,2})?/",
    "ANY_STRING": r"""/"([^"\\\n]|\\[^xuUN0-9\n])*"|'([^'\\\n]|\\[^xuUN0-9\n])*'/""",
}


class PythonicReader(ToolReader):
    """Reads calls of the form `[name(key=value, ...), ...]`, at the beginning of the text or after the tag.

    Without the tag a list that does not begin with a function of the request is content.
    """

    marker = TAG

    def __init__(self, schemas: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(schemas)
        self._state, self._tagged = self._begin_text, False

    def _begin_text(self, char: str) -> None:
        if char in SPACE + "[":
            self._held += char
            self._state = self._before_call if char == "[" else self._begin_text
        else:
            self._state = self._read_text
            self._read_text(char)

    def _after_marker(self, char: str) -> None:
        self._tagged = True
        if char in SPACE + "[":
            self._held += char
            self._state = self._before_call if char == "[" else self._after_marker
        else:
            self._refuse(char)

    def _before_call(self, char: str) -> None:
        if char in SPACE:
            self._held += char
        else:
            self._begin_call(PythonCall(), char)

    def _after_call(self, char: str) -> None:
        if char in SPACE + ",":
            return
        if char == "]":
            self._state = self._read_text
        elif char.isalpha() or char == "_":
            self._begin_call(PythonCall(), char)
        else:
            self._state = self._read_text
            self._read_text(char)

    def _accepts(self, name: str) -> bool:
        return self._tagged or name in self.schemas


class Lfm2Reader(PythonicReader):
    """Reads the same list after the tag of LFM2."""

    marker = LFM2_TAG


def pythonic_calls(grammar: CallGrammar) -> str:
    """Return the rule of a list of calls; values other than booleans are written as `json.dumps` writes them."""
    for index, (name, schema) in enumerate(grammar.tools):
        grammar.add(f"arguments_{index}", _arguments(grammar, index, name, parameters_of(name, schema)))
    heads = [quoted(f"{name}(") for name in grammar.names]
    grammar.add("call", grammar.either(heads) + ' ")"')
    return f'"[" call {grammar.repeated(quoted(", ") + " call")} "]"'


def lfm2_calls(grammar: CallGrammar) -> str:
    """Return the same rule, with the tag of LFM2 before the list."""
    return f"{grammar.lead(LFM2_TAG)} {pythonic_calls(grammar)}"


def _arguments(grammar: CallGrammar, index: int, function: str, parameters: list[Parameter] | None) -> str:
    """Return the rule of the arguments of a function, in the order of its parameters."""
    if parameters is None:
        for name, rule in _ANY.items():
            grammar.add(name, rule)
        return "any_arguments"
    starts, rest = list[str](), ""
    for place in range(len(parameters) - 1, -1, -1):  # what may follow an argument is known first
        one, pair = parameters[place], f"pair_{index}_{place}"
        if not re.fullmatch(r"[^\W\d]\w*", one.name):
            raise not_constrained(function, f"{one.name!r} is no name of Python")
        value = '("True" | "False")'
        if not one.is_free or types_of(one.schema) != {"boolean"}:
            grammar.add(f"value_{index}_{place}", json_rule(one.schema))
            value = f"value_{index}_{place}"
        grammar.add(pair, f"{quoted(f'{one.name}=')} {value}")
        starts = [f"{pair} {rest}", *([] if one.required else starts)]
        grammar.add(f"rest_{index}_{place}", f'(", " {pair}){"" if one.required else "?"} {rest}')
        rest = f"rest_{index}_{place}"
    return f"({' | '.join(starts)}){'' if any(one.required for one in parameters) else '?'}" if starts else '""'
