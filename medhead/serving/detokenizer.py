"""The text of one request as it grows: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medhead.core.streaming import TextStream


class Output:
    """Turns tokens into text and ends at stop texts.

    Args:
        tokenizer: what decodes.
        stop: texts at which the output ends, without them.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer), [text for text in stop if text]
        self._held = ""  # may be the beginning of a stop text
        self._ready = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; returns what it adds to the text, stop texts not looked at."""
        fresh = self._stream.push([token])
        self._look(fresh)
        return fresh

    def take(self) -> str:
        """The text that became certain since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def finish(self) -> str:
        """As `take`, with all that was held back; there are no more tokens."""
        if not self.stopped:
            self._look(self._stream.finish())
        if not self.stopped:
            self._ready, self._held = self._ready + self._held, ""
        return self.take()

    def _look(self, fresh: str) -> None:
        if self.stopped or not fresh:
            return
        text = self._held + fresh
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            self._ready, self._held = self._ready + text[: min(places)], ""
            return
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._ready, self._held = self._ready + text[: len(text) - keep], text[len(text) - keep :]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
