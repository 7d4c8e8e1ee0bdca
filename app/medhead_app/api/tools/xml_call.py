"""A call of the form `<function=name><parameter=key>value</parameter></function>`, read one character at a time."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from medhead_app.api.tools.json_call import SPACE
from medhead_app.api.tools.parameters import has_type, types_of, with_definitions

FUNCTION, PARAMETER, END_VALUE, END_CALL = "<function=", "<parameter=", "</parameter>", "</function>"


class XmlCall:
    """A call whose values have the types of the function's schema; its arguments come as JSON.

    Text without a known type is a string. A line break after the tag of a parameter and one before its end are no part of
    the value. Characters of strings are handed on as they come, other values when they end.

    Args:
        schemas: JSON schema of the arguments of each function, by its name.
    """

    def __init__(self, schemas: Mapping[str, dict[str, Any]]) -> None:
        self.name: str | None = None
        self.done = self.failed = False
        self._schemas, self._read = schemas, self._read_tag
        self._text, self._comma = "", ""  # of the tag, the name or the value
        self._types = frozenset[str]()
        # end of the value, which may be part of its end tag; None before its first character
        self._held: str | None = None

    @property
    def started(self) -> bool:
        """Whether the name is known."""
        return self.name is not None

    def put(self, char: str) -> str:
        """Take a character; return the text of the arguments that is new and final."""
        return self._read(char)

    def _read_tag(self, char: str) -> str:
        """Take a character of a tag, or white space before it."""
        if not self._text and char in SPACE:
            return ""
        self._text += char
        allowed = (FUNCTION,) if self.name is None else (PARAMETER, END_CALL)
        if self._text not in allowed:
            self.failed = not any(tag.startswith(self._text) for tag in allowed)
            return ""
        self.done, self._read = self._text == END_CALL, self._read_name
        self._text = ""
        return "}" if self.done else ""

    def _read_name(self, char: str) -> str:
        """Take a character of the name of the function or of a parameter."""
        name = self._text.strip()
        if char != ">":
            self.failed, self._text = char in "<\n", self._text + char
            return ""
        self._text = ""
        if not name:
            self.failed = True
            return ""
        if self.name is None:
            self.name, self._read = name, self._read_tag
            return "{"
        self._types = _argument_types(self._schemas.get(self.name, {}), name)
        self._held, self._read = None, self._read_value
        comma, self._comma = self._comma, ", "
        return f"{comma}{json.dumps(name, ensure_ascii=False)}: {'' if self._waits else chr(34)}"

    @property
    def _waits(self) -> bool:
        """Whether the value must be known before it is handed on."""
        return bool(self._types - {"string"})

    def _read_value(self, char: str) -> str:
        """Take a character of a value."""
        if self._held is None:
            self._held = ""
            if char == "\n":
                return ""
        held = self._held + char
        if held.endswith(END_VALUE):
            self._held, self._read = "", self._read_tag
            text, self._text = self._text, ""
            return converted(text, self._types) if self._waits else '"'
        size = next(size for size in range(len(held), -1, -1) if _may_end(held[len(held) - size :]))
        self._held, text = held[len(held) - size :], held[: len(held) - size]
        if self._waits:
            self._text += text
            return ""
        return json.dumps(text, ensure_ascii=False)[1:-1]


def _argument_types(schema: dict[str, Any], name: str) -> frozenset[str]:
    """Return the types of an argument, none where the schema of all of them does not say them."""
    try:
        return types_of(with_definitions(schema, schema["properties"][name]))
    except (AttributeError, KeyError, TypeError):  # not declared, or no JSON schema
        return frozenset()


def converted(text: str, types: frozenset[str]) -> str:
    """Return the JSON of a value of these types; a text that is no value of another type is a string, as it is."""
    types -= {"string"}
    try:
        if has_type(json.loads(text, parse_constant=_refuse), types):
            return text.strip()
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text.strip())
        if has_type(found, types):
            return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        pass
    return json.dumps(text, ensure_ascii=False)


def _may_end(text: str) -> bool:
    return END_VALUE.startswith(text) or f"\n{END_VALUE}".startswith(text)


def _refuse(word: str) -> None:
    raise ValueError(word)
