"""The format of Hermes and Qwen: `<tool_call>` and `</tool_call>` around a JSON object."""

from __future__ import annotations

from medhead_app.api.tools.grammar import CallGrammar, quoted
from medhead_app.api.tools.json_call import JsonCall
from medhead_app.api.tools.reader import ToolReader

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesReader(ToolReader):
    """Reads calls of the form `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; the end may be missing."""

    marker = BEGIN

    def _after_marker(self, char: str) -> None:
        self._tail = ""
        self._begin_call(JsonCall(), char)

    def _after_call(self, char: str) -> None:
        self._tail += char
        if self._tail.endswith(END):
            self._state = self._read_text
        elif self._tail.endswith(BEGIN):
            self._held, self._state = BEGIN, self._after_marker


def hermes_calls(grammar: CallGrammar) -> str:
    """Return the rule of calls in the form that models are trained to write."""
    heads = [quoted(f'\n{{"name": "{name}", "arguments": ') for name in grammar.names]
    grammar.add("call", grammar.either(heads) + " " + quoted("}\n") + " " + grammar.token(END))
    first = f"{grammar.lead(BEGIN)} call"
    return f"{first} {grammar.repeated(first if grammar.free else quoted(chr(10)) + ' ' + first)}"
