"""The formats of Mistral: `[TOOL_CALLS]` and a JSON list, or `[TOOL_CALLS]name[ARGS]` and the arguments."""

from __future__ import annotations

import re

from medhead_app.api.tools.grammar import CallGrammar, quoted
from medhead_app.api.tools.json_call import SPACE, JsonCall, NamedArguments
from medhead_app.api.tools.reader import ToolReader

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_HEADER = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\]\s*)?")


class MistralReader(ToolReader):
    """Reads calls of both forms: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]` and `[TOOL_CALLS]name[ARGS]{...}`.

    The newer form may have `[CALL_ID]` and an id before `[ARGS]`, or none of both.
    """

    marker = BEGIN
    _listed = False  # whether the calls are members of a list

    def _after_marker(self, char: str) -> None:
        self._listed = char == "["
        if char in SPACE or self._listed:
            self._held += char
            self._state = self._before_member if self._listed else self._after_marker
        elif char == "{":
            self._begin_call(JsonCall(), char)
        else:
            self._state = self._read_header
            self._read_header(char)

    def _before_member(self, char: str) -> None:
        if char == "{":
            self._begin_call(JsonCall(), char)
        elif char in SPACE:
            self._held += char
        else:
            self._refuse(char)

    def _read_header(self, char: str) -> None:
        """Take a character before the arguments of the newer form."""
        if char != "{":
            self._held += char
            return
        found = _HEADER.fullmatch(self._held.lstrip())
        if found is None:
            self._refuse(char)
        else:
            self._begin_call(NamedArguments(found[1]), char)

    def _after_call(self, char: str) -> None:
        if self._listed and char == "{":
            self._begin_call(JsonCall(), char)
        elif not self._listed or char not in SPACE + ",":
            self._state = self._read_text
            if char != "]" or not self._listed:
                self._read_text(char)


def mistral_list(grammar: CallGrammar) -> str:
    """Return the rule of calls as a list."""
    heads = [quoted(f'{{"name": "{name}", "arguments": ') for name in grammar.names]
    grammar.add("call", grammar.either(heads) + ' "}"')
    return f'{grammar.lead(BEGIN)} " "? "[" call {grammar.repeated(quoted(", ") + " call")} "]"'


def mistral_named(grammar: CallGrammar) -> str:
    """Return the rule of calls as names and arguments."""
    args = grammar.token(ARGS)
    call = grammar.lead(BEGIN) + " " + grammar.either([f"{quoted(name)} {args}" for name in grammar.names])
    return f"{call} {grammar.repeated(call)}"
