"""Streaming: several tokens a step, handed on one column at a time and decoded without breaking a character."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

_MAX_WINDOW = 32  # tokens of a window before it is cut


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
    """Turns tokens into text incrementally; a character waits until all of its bytes have been emitted.

    Every call decodes only a short window of tokens. The window begins where a character begins: tokenizers with byte fallback
    turn all bytes in a row into U+FFFD if one of them has lost its character.

    Args:
        tokenizer: what decodes.
        skip_special_tokens: leave out end tokens and the like.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._text = ""  # the part of the window's text that was returned
        self._complete = 0  # tokens of the window up to the end of a character

    def push(self, tokens: list[int]) -> str:
        """Return the text that is final after these tokens and was not before."""
        self._window += tokens
        text = self._decode()
        final = text.rstrip("\ufffd")  # U+FFFD may become a character with the next bytes
        new_text = final[len(self._text) :]
        if new_text:
            self._text = final
        if new_text and final == text:
            if len(self._window) > _MAX_WINDOW:
                self._window = self._window[self._complete :]
                self._text = self._decode()
            self._complete = len(self._window)
        return new_text

    def finish(self) -> str:
        """Return the text that was held back."""
        new_text = self._decode()[len(self._text) :]
        self._window, self._complete, self._text = [], 0, ""
        return new_text

    def _decode(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)
