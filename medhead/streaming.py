"""Streaming: several tokens a step, handed on one column at a time and decoded without breaking a character."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medhead.row import Row


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

    def add(self, row: Row, new: list[int], ended: bool) -> None:
        """Take new tokens of a row, and whether they are its last; hand on every column that is complete."""
        self._outputs[row.index] += new
        self._ended[row.index] = ended
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

    Only a short window is decoded at every call, not the whole output again.

    Args:
        tokenizer: what decodes.
        skip_special_tokens: leave out end tokens and the like.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._shown = ""  # text of the window that was handed out

    def push(self, tokens: list[int]) -> str:
        """New text that is certain after these tokens."""
        self._window += tokens
        text = self._decode()
        certain = text.rstrip("\ufffd")  # what may still become a character once its other bytes are there
        if not certain.startswith(self._shown):
            return ""
        fresh = certain[len(self._shown) :]
        self._shown = certain
        if len(self._window) > 32 and fresh and certain == text:
            self._window = self._window[-8:]
            self._shown = self._decode()
        return fresh

    def finish(self) -> str:
        """What was held back."""
        text = self._decode()
        fresh = text[len(self._shown) :] if text.startswith(self._shown) else text
        self._window, self._shown = [], ""
        return fresh

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)
