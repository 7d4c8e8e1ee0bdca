"""Streaming to a terminal, with accepted draft tokens and bonus tokens marked."""

from __future__ import annotations

import os

from transformers import PreTrainedTokenizerBase

from medhead.core.streaming import TextStream

ACCEPTED, BONUS, OFF = "\033[32m", "\033[4m", "\033[0m"  # green; underlined


class TerminalPrinter:
    """Print text as it is decoded, and keep it.

    Args:
        tokenizer: decodes the tokens.
        trace: color accepted draft tokens green and underline bonus tokens (unless NO_COLOR is set).
        silent: print nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, trace: bool = False, silent: bool = False) -> None:
        self._stream, self._silent, self._trace = TextStream(tokenizer), silent, trace
        self._colors = trace and not os.environ.get("NO_COLOR")
        self.text = ""
        self.tokens: list[int] = []

    def show(self, tokens: list[int]) -> None:
        """Print the tokens of one pass: accepted draft tokens, then the bonus token."""
        self.tokens += tokens
        if not self._trace:
            self._print(self._stream.push(tokens))
            return
        for index, token in enumerate(tokens, 1):
            self._print(self._stream.push([token]), BONUS if index == len(tokens) else ACCEPTED)

    def finish(self) -> None:
        """Print the text that was held back, and end the line."""
        self._print(self._stream.finish())
        if not self._silent and self.text:
            print(flush=True)

    def _print(self, text: str, style: str = "") -> None:
        self.text += text
        if text and not self._silent:
            print(f"{style}{text}{OFF}" if style and self._colors else text, end="", flush=True)
