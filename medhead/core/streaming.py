"""Streaming: several tokens a step, handed on one column at a time and decoded without breaking a character."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_LONGEST = 32  # tokens of a window that is cut


class ColumnStream:
    """Feeds a transformers streamer as plain decoding would: one token of every row at a time, in step.

    Args:
        streamer: anything with `put` and `end`.
        rows: number of rows; rows that have ended are filled with `pad`.
        pad: token for ended rows.
    """

    def __init__(self, streamer: Any, rows: int, pad: int) -> None:
        self.streamer, self.pad = streamer, pad
        self._outputs: list[list[int]] = [[] for _ in range(rows)]
        self._ended = [False] * rows
        self._sent = 0

    def add(self, row: int, new: list[int], ended: bool) -> None:
        """Take new tokens of a row, and whether they are its last; hand on every column that is complete."""
        self._outputs[row] += new
        self._ended[row] = ended
        self._flush()

    def finish(self) -> None:
        """All rows have ended."""
        self._ended = [True] * len(self._ended)
        self._flush()
        self.streamer.end()

    def _flush(self) -> None:
        goal = max(map(len, self._outputs))
        while self._sent < goal:
            ready = (
                len(output) > self._sent or ended for output, ended in zip(self._outputs, self._ended, strict=True)
            )
            if not all(ready):
                return
            at = self._sent
            self.streamer.put(torch.tensor([out[at] if len(out) > at else self.pad for out in self._outputs]))
            self._sent += 1


class TextStream:
    """Turns tokens into text piece by piece; a character whose bytes are not all there yet waits for them.

    Only a short window is decoded at every call, not the whole output again. It begins where a character begins: tokenizers with
    byte fallback turn all bytes in a row into U+FFFD if one of them has lost its character.

    Args:
        tokenizer: what decodes.
        skip_special_tokens: leave out end tokens and the like.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._text = ""  # what was handed out of its text
        self._complete = 0  # tokens of the window behind which a character begins

    def push(self, tokens: list[int]) -> str:
        """New text that is certain after these tokens."""
        self._window += tokens
        text = self._decode()
        certain = text.rstrip("\ufffd")  # what may still become a character once its other bytes are there
        fresh = self._behind(certain)
        if fresh:
            self._text = certain
        if fresh and certain == text:
            if len(self._window) > _LONGEST:
                self._window = self._window[self._complete :]
                self._text = self._decode()
            self._complete = len(self._window)
        return fresh

    def finish(self) -> str:
        """What was held back."""
        fresh = self._behind(self._decode())
        self._window, self._complete, self._text = [], 0, ""
        return fresh

    def _behind(self, text: str) -> str:
        """The text of the window behind what was handed out, which stays, whatever becomes of its last bytes."""
        return text[len(self._text) :]

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)
