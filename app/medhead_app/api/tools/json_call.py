"""A call as a JSON object, read one character at a time: its name, and its arguments as they come."""

from __future__ import annotations

import json
from typing import Any, Protocol

SPACE = " \t\r\n"
_BARE = frozenset("0123456789+-.eEtrufalsn:," + SPACE)  # characters of JSON outside of strings, brackets aside
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """One JSON value; only its brackets and strings are checked.

    Attributes:
        text: of the value so far.
        done: whether a bracket or a quotation mark has ended it; a number or a word ends with the character after it.
    """

    def __init__(self) -> None:
        self.text, self.done = "", False
        self._closers, self._in_string, self._escaped = "", False, False

    @property
    def is_open(self) -> bool:
        """Whether the value needs more characters."""
        return not self.text or self._in_string or bool(self._closers)

    def put(self, char: str) -> bool:
        """Take a character; return whether it belongs to the value."""
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif self.done or not self._put_bare(char):
            return False
        self.text += char
        self.done = not self.is_open and char in '"}]'
        return True

    def _put_bare(self, char: str) -> bool:
        """Take a character outside of strings."""
        if char == '"':
            self._in_string = not self.text or bool(self._closers)
            return self._in_string
        if char in "{[":
            belongs = not self.text or bool(self._closers)
            self._closers += ("}" if char == "{" else "]") if belongs else ""
            return belongs
        if self._closers.endswith(char):  # a character is never empty
            self._closers = self._closers[:-1]
            return True
        return char in _BARE and (bool(self._closers) or char not in ":," + SPACE)


class Call(Protocol):
    """What reads one call.

    Attributes:
        name: of the function, None until it is known.
        done: whether the call is complete.
        failed: whether the text is no call, or not the rest of one.
    """

    name: str | None
    done: bool
    failed: bool

    @property
    def started(self) -> bool:
        """Whether the text is a call for sure: its name is known and its arguments have begun."""

    def put(self, char: str) -> str:
        """Take a character; return the text of the arguments that is new and final."""


class NamedArguments:
    """The arguments of a function whose name is known, as a JSON object."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.done = self.failed = False
        self._value = JsonValue()

    @property
    def started(self) -> bool:
        """Whether the arguments have begun."""
        return bool(self._value.text)

    def put(self, char: str) -> str:
        """Take a character; return the text of the arguments that is new and final."""
        self.failed = not self._value.put(char)
        self.done = self._value.done
        return "" if self.failed else char


class JsonCall:
    """A call as an object with `name` and `arguments` or `parameters`, in any order; other members are ignored.

    Arguments are an object, whose text is kept as it is; a string with the text of one; or missing or null, which is `{}`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.failed = False
        self._expected = "{"  # what comes next: { key : value next
        self._key, self._value = "", JsonValue()
        self._begun = self._streams = False
        self._new = ""

    @property
    def started(self) -> bool:
        """Whether the name is known and the arguments have begun."""
        return self.name is not None and self._begun

    def put(self, char: str) -> str:
        """Take a character; return the text of the arguments that is new and final."""
        if self._expected in ("key", "value"):
            self._put_value(char)
        elif char not in SPACE:
            self._put_mark(char)
        if not self.started or self.failed:
            return ""
        new, self._new = self._new, ""
        return new

    def _put_mark(self, char: str) -> None:
        """Take a character between keys and values."""
        if self._expected == "next" and char == "}":
            self._end()
        elif char == {"{": "{", ":": ":", "next": ","}[self._expected]:
            self._expected, self._value = "value" if char == ":" else "key", JsonValue()
        else:
            self.failed = True

    def _put_value(self, char: str) -> None:
        value, empty = self._value, not self._value.text
        if empty and char in SPACE:
            return
        if empty and self._expected == "key" and char != '"':
            if char == "}":
                self._end()
            else:
                self.failed = True
            return
        if not value.put(char):
            self.failed = value.is_open or not self._take(value.text)
            if not self.failed and char not in SPACE:
                self._put_mark(char)
            return
        if empty and char == "{" and self._expected == "value" and self._key in _ARGUMENTS and not self._begun:
            self._begun = self._streams = True
        if self._streams:
            self._new += char
        if value.done:
            self._streams = False
            self.failed = not self._take(value.text)

    def _take(self, text: str) -> bool:
        """Take a complete key or value; return whether a call may have it."""
        if self._expected == "value" and text[0] == "{":
            self._expected = "next"
            return self._key != "name"
        try:
            found: Any = json.loads(text, strict=False)
        except ValueError:
            return False
        if self._expected == "key":
            self._key, self._expected = found, ":"
            return True
        self._expected = "next"
        if self._key == "name":
            self.name = found if isinstance(found, str) and found else None
            return self.name is not None
        if self._key in _ARGUMENTS and not self._begun:
            self._begun, self._new = bool(found), found or ""
            return found is None or isinstance(found, str)
        return True

    def _end(self) -> None:
        self.done, self.failed = self.name is not None, self.name is None
        if not self._begun:
            self._begun, self._new = True, "{}"
