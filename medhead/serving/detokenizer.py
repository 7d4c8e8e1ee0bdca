"""The text of one request as it grows: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medhead.core.streaming import TextStream


class Detokenizer:
    """Turns tokens into text and ends at stop strings.

    Args:
        tokenizer: what decodes.
        stop: strings at which the text ends; they are not part of it.
        special_tokens: ids of special tokens that are part of the text; the others are left out.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), special_tokens: Sequence[int] = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer), [text for text in stop if text]
        self._pending_text = ""  # may be the beginning of a stop string
        self._committed_text = ""  # final, not taken yet
        self._special = {token: str(tokenizer.decode([token])) for token in special_tokens}
        self.stopped = False

    def add(self, token: int) -> str:
        """Take a token; return what it adds to the text, stop strings ignored."""
        special = self._special.get(token)
        new_text = self._stream.push([token]) if special is None else self._stream.finish() + special
        self._append(new_text)
        return new_text

    def stops_at(self, token: int) -> bool:
        """Take a token; return whether the text ends with it."""
        self.add(token)
        return self.stopped

    def take(self) -> str:
        """Return the text that became final since the last call."""
        text, self._committed_text = self._committed_text, ""
        return text

    def finish(self) -> str:
        """Return what `take` would, with all that was held back; there are no more tokens."""
        if not self.stopped:
            self._append(self._stream.finish())
        if not self.stopped:
            self._committed_text, self._pending_text = self._committed_text + self._pending_text, ""
        return self.take()

    def _append(self, new_text: str) -> None:
        if self.stopped or not new_text:
            return
        text = self._pending_text + new_text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            self._committed_text, self._pending_text = self._committed_text + text[: min(places)], ""
            return
        keep = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._committed_text, self._pending_text = self._committed_text + text[:keep], text[keep:]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
