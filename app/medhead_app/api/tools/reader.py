"""The content and the calls of a text, read one character at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from medhead_app.api.tools.json_call import Call


@dataclass(frozen=True)
class Delta:
    """What a piece of the text adds to the answer.

    Attributes:
        text: of the content, or of the arguments of a call.
        call: index of the call; None for content.
        name: of the function, in the first delta of a call.
    """

    text: str
    call: int | None = None
    name: str | None = None


class ToolReader(ABC):
    """Reads one text. Deltas joined are the same for every split of the text into pieces.

    White space next to a call is left out. What begins as a call and is none is content, as it is written. Arguments are kept
    as they are written, also where they are not JSON; the rest of such a call is left out.

    Args:
        schemas: JSON schema of the arguments of each function that may be called, by its name.
    """

    marker: ClassVar[str]  # what calls begin with

    def __init__(self, schemas: Mapping[str, dict[str, Any]]) -> None:
        self.schemas, self.calls = schemas, 0
        self._state: Callable[[str], None] = self._read_text
        self._held = ""  # content, unless a call follows or it is part of one
        self._deltas: list[Delta] = []
        self._call: Call | None = None
        self._started = False  # whether the call was handed on

    def feed(self, text: str) -> list[Delta]:
        """Return what a piece of the text adds."""
        for char in text:
            self._state(char)
        return self._take()

    def finish(self) -> list[Delta]:
        """Return what was held back at the end of the text."""
        if self._held.strip() or not self.calls:
            self._add(Delta(self._held))
        self._held = ""
        return self._take()

    @abstractmethod
    def _after_marker(self, char: str) -> None:
        """Take a character between the marker and a call."""

    @abstractmethod
    def _after_call(self, char: str) -> None:
        """Take a character after a call, or the one that its arguments cannot go on with."""

    def _read_text(self, char: str) -> None:
        """Take a character of content or of a marker."""
        text = self._held + char
        kept = _tail(text, self.marker)
        self._add(Delta(text[: len(text) - kept]))
        self._held = text[len(text) - kept :]
        if self._held.endswith(self.marker):
            self._state = self._after_marker

    def _refuse(self, char: str) -> None:
        """Take what was held for content, and then the character."""
        self._add(Delta(self._held))
        self._held, self._state = "", self._read_text
        self._read_text(char)

    def _begin_call(self, call: Call, char: str = "") -> None:
        """Read a call from its first character on."""
        self._call, self._started, self._state = call, False, self._read_call
        if char:
            self._read_call(char)

    def _accepts(self, name: str) -> bool:
        """Return whether a call of this function is one."""
        return True

    def _read_call(self, char: str) -> None:
        call = self._call
        assert call is not None
        new = call.put(char)
        if not self._started and call.started:
            assert call.name is not None
            if not self._accepts(call.name):
                self._refuse(char)
                return
            self._add(Delta("", self.calls, call.name))
            self._started, self._held, self.calls = True, "", self.calls + 1
        if not self._started:
            if call.failed:
                self._refuse(char)
            else:
                self._held += char
            return
        self._add(Delta(new, self.calls - 1))
        if call.done or call.failed:
            self._state = self._after_call
            if call.failed:
                self._after_call(char)

    def _add(self, delta: Delta) -> None:
        if not delta.text and delta.name is None:
            return
        last = self._deltas[-1] if self._deltas else None
        if last is not None and last.call == delta.call and delta.name is None:
            self._deltas[-1] = replace(last, text=last.text + delta.text)
        else:
            self._deltas.append(delta)

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _tail(text: str, marker: str) -> int:
    """Return how many characters at the end are white space and a part of the marker, which may be empty or whole."""
    sizes = range(min(len(text), len(marker)), 0, -1)
    part = next((size for size in sizes if text.endswith(marker[:size])), 0)
    return len(text) - len(text[: len(text) - part].rstrip())
