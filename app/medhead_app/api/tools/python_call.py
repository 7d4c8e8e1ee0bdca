"""A call as in Python, `name(key=value, ...)`, read one character at a time; its arguments come as JSON."""

from __future__ import annotations

import json
import math
import re

from medhead_app.api.tools.json_call import SPACE

_WORD = re.compile(r"[\w.+-]")  # characters of names and numbers
_CLOSERS = {"[": "]", "{": "}"}
_CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""}
_ESCAPES |= {char: char for char in "\\'\"/"}  # JSON has "\/"
_HEX = {"x": 2, "u": 4, "U": 8}  # digits


class PythonString:
    """The inside of a string literal, from the character after its quotation mark on.

    Attributes:
        done: whether the closing quotation mark was read.
        failed: whether an escape has wrong digits.
    """

    def __init__(self, quote: str) -> None:
        self.done = self.failed = False
        self._quote, self._escape = quote, ""

    def put(self, char: str) -> str:
        """Take a character; return the text of the JSON string that is new. Octal and named escapes stay as they are written."""
        if not self._escape:
            self.done = char == self._quote
            self._escape = "\\" if char == "\\" else ""
            return "" if self.done or self._escape else _inside(char)
        self._escape += char
        kind, digits = self._escape[1], self._escape[2:]
        if kind not in _HEX:
            return self._end_escape(_inside(_ESCAPES.get(kind, self._escape)))
        if len(digits) < _HEX[kind]:
            return ""
        if not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
            self.failed = True
            return ""
        # half of a surrogate pair stays an escape, as in JSON
        return self._end_escape(f"\\u{digits}" if kind == "u" else _inside(chr(int(digits, 16))))

    def _end_escape(self, text: str) -> str:
        self._escape = ""
        return text


class PythonCall:
    """A call whose arguments have names; values are constants, numbers, strings, lists and dictionaries.

    `true`, `false` and `null` are values too. Strings next to each other are one, as in Python. Characters of strings are
    handed on as they come, other values when they end.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = self.failed = False
        self._closers = ""  # of the brackets that are open
        self._expected = "name"  # what comes next: name, key, : (after a key), value, or next (a comma or a bracket)
        self._word, self._comma, self._new = "", "", ""
        self._string: PythonString | None = None
        self._in_text = self._begun = False

    @property
    def started(self) -> bool:
        """Whether the name is known and the first argument or the end has begun."""
        return self._begun

    def put(self, char: str) -> str:
        """Take a character; return the text of the arguments that is new and final."""
        if self._string is not None:
            self._put_string(self._string, char)
        elif _WORD.match(char):
            self._put_word(char)
        elif char in "'\"":
            self._begin_string(char)
        else:
            self._put_mark(char)
        if not self._begun or self.failed:
            return ""
        new, self._new = self._new, ""
        return new

    def _put_string(self, string: PythonString, char: str) -> None:
        self._new += string.put(char)
        self.failed = string.failed
        if string.done:
            self._string = None

    def _put_word(self, char: str) -> None:
        if self._in_text or self._expected in (":", "next") or self._word.endswith(" "):
            self.failed = True
        else:
            self._word += char

    def _begin_string(self, quote: str) -> None:
        in_dictionary = self._expected == "key" and len(self._closers) > 1
        if self._word or not (self._in_text or in_dictionary or self._expected == "value"):
            self.failed = True
            return
        if not self._in_text:
            self._write('"')
        self._string, self._in_text = PythonString(quote), True

    def _put_mark(self, char: str) -> None:
        """Take white space, a bracket, a comma, or the mark after a key."""
        if char in SPACE:
            self._word += " " if self._word and not self._word.endswith(" ") else ""
            return
        if not self._end_value():
            self.failed = True
        elif char == "," and self._expected == "next":
            self._comma, self._expected = ", ", "value" if self._closers[-1] == "]" else "key"
        elif char == ("=" if len(self._closers) == 1 else ":") and self._expected == ":":
            self._new, self._expected, self._begun = self._new + ": ", "value", True
        elif char == "(" and self._expected == "(":
            self._open(")", "{")
        elif char in _CLOSERS and self._expected == "value":
            self._open(_CLOSERS[char], char)
        elif self._closers.endswith(char) and self._expected in ("key", "next", "value" if char == "]" else ""):
            self._close(char)
        else:
            self.failed = True

    def _end_value(self) -> bool:
        """End a word or the strings before a mark; return whether a call may have them there."""
        word, self._word = self._word.strip(), ""
        if self._in_text:
            self._new, self._in_text = self._new + '"', False
            self._expected = ":" if self._expected == "key" else "next"
        elif word and self._expected == "name":
            self.name, self._expected = word, "("
        elif word and self._expected == "key" and len(self._closers) == 1:
            self._write(json.dumps(word, ensure_ascii=False))
            self._expected = ":"
        elif word:
            value = _constant(word)
            if value is None:
                return False
            self._write(value if self._expected == "value" else json.dumps(value))  # a key of JSON is a string
            self._expected = "next" if self._expected == "value" else ":"
        return True

    def _open(self, closer: str, text: str) -> None:
        self._write(text)
        self._closers += closer
        self._expected = "value" if closer == "]" else "key"

    def _close(self, char: str) -> None:
        self._closers, self._comma = self._closers[:-1], ""
        self._new += "}" if char == ")" else char
        self._expected, self._begun, self.done = "next", True, not self._closers

    def _write(self, text: str) -> None:
        """Write the beginning of a key or a value, after the comma where one is due."""
        self._new, self._comma = self._new + self._comma + text, ""


def _inside(text: str) -> str:
    """Return a text as it is inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _constant(word: str) -> str | None:
    """Return the JSON of a constant or a number, None for another word."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    try:
        return str(int(word))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        return None
    return json.dumps(number) if math.isfinite(number) else None
