"""Streaming to a terminal, with the tokens of a pass coloured by where they came from."""

from __future__ import annotations

import os
import sys

from transformers import PreTrainedTokenizerBase

from medhead.core.streaming import TextStream

ACCEPTED, BONUS, OFF = "\033[32m", "\033[4m", "\033[0m"  # green; underlined


class TerminalPrinter:
    """Prints text as it comes and remembers it.

    Args:
        tokenizer: what decodes.
        trace: colour accepted guesses green and bonus tokens underlined (unless NO_COLOR is set).
        silent: print nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, trace: bool = False, silent: bool = False) -> None:
        self._stream, self._silent = TextStream(tokenizer), silent
        self._colours = trace and not os.environ.get("NO_COLOR")
        self.trace, self.tokens, self.text = trace, [], ""  # type: ignore[var-annotated]

    def show(self, tokens: list[int]) -> None:
        """The tokens of one pass: accepted guesses, then the bonus token."""
        self.tokens += tokens
        if not self.trace:
            self._print(self._stream.push(tokens))
            return
        for index, token in enumerate(tokens):
            self._print(self._stream.push([token]), BONUS if index == len(tokens) - 1 else ACCEPTED)

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        self._print(self._stream.finish())
        if not self._silent and self.text:
            print(flush=True)

    def _print(self, text: str, colour: str = "") -> None:
        self.text += text
        if self._silent or not text:
            return
        sys.stdout.write(f"{colour}{text}{OFF}" if colour and self._colours else text)
        sys.stdout.flush()
