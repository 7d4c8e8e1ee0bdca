"""The format of Llama 3: the whole answer is a JSON object, with or without `<|python_tag|>` before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medhead_app.api.tools.grammar import CallGrammar, quoted
from medhead_app.api.tools.json_call import SPACE, JsonCall
from medhead_app.api.tools.reader import ToolReader

TAG = "<|python_tag|>"


class Llama3Reader(ToolReader):
    """Reads calls of the form `{"name": ..., "parameters": {...}}`, at the beginning of the text or after the tag.

    Several calls are separated by `;`. Without the tag an object that names no function of the request is content.
    """

    marker = TAG

    def __init__(self, schemas: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(schemas)
        self._state, self._tagged = self._begin_text, False

    def _begin_text(self, char: str) -> None:
        if char == "{":
            self._begin_call(JsonCall(), char)
        elif char in SPACE:
            self._held += char
        else:
            self._state = self._read_text
            self._read_text(char)

    def _after_marker(self, char: str) -> None:
        self._tagged = True
        if char in SPACE:
            self._held += char
        elif char == "{":
            self._begin_call(JsonCall(), char)
        else:
            self._refuse(char)

    def _after_call(self, char: str) -> None:
        if char == "{":
            self._begin_call(JsonCall(), char)
        elif char not in SPACE + ";,":
            self._state = self._read_text
            self._read_text(char)

    def _accepts(self, name: str) -> bool:
        return self._tagged or name in self.schemas


def llama3_calls(grammar: CallGrammar) -> str:
    """Return the rule of one call; these models are trained to write one at a time."""
    # in the pieces of JSON's own grammar, because an answer that is an object begins in the same way
    heads = [("{", '"name"', ": ", f'"{name}"', ", ", '"parameters"', ": ") for name in grammar.names]
    return grammar.either([" ".join(map(quoted, head)) for head in heads]) + ' "}"'
