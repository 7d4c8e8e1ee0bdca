"""Streaming to a terminal, with accepted draft tokens and bonus tokens marked, and the count of runs."""

from __future__ import annotations

import os
import sys

from transformers import PreTrainedTokenizerBase

from medhead.core.streaming import TextStream

ACCEPTED, BONUS, OFF = "\033[32m", "\033[4m", "\033[0m"  # green; underlined


class TerminalPrinter:
    """Print text as it is decoded, unless `silent`, and keep it; `trace` marks the tokens unless NO_COLOR is set."""

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


class RunCounter:
    """Say on standard error which run is going on: in place on a terminal, elsewhere only how many there are.

    Args:
        total: number of runs.
        done: runs that are done already.
        silent: whether to say nothing.
    """

    def __init__(self, total: int, done: int = 0, silent: bool = False) -> None:
        self.total, self.done = total, done
        self._in_place = not silent and sys.stderr.isatty()
        if not silent and not self._in_place:
            print(f"medhead: {total - done} more runs", file=sys.stderr, flush=True)
        self.add(0)

    def add(self, runs: int = 1) -> None:
        """Count runs; the line disappears after the last."""
        self.done += runs
        if self._in_place:
            line = f"medhead: run {self.done + 1} of {self.total}"
            text = line if self.done < self.total else " " * len(line) + "\r"
            print(f"\r{text}", end="", file=sys.stderr, flush=True)
