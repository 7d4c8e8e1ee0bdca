"""What page and API share: the engine, the tokenizer, the model's name and the limits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medhead.errors import MedheadError
from medhead.serving.engine import Engine
from medhead.serving.request import Request


class PromptTooLongError(MedheadError):
    """The prompt does not fit the model's context, or is longer than the server allows."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model reads it.

    Attributes:
        ids: token ids, up to where the answer begins.
        dropped: oldest messages that were left out because they did not fit.
    """

    ids: list[int]
    dropped: int = 0


class Service:
    """One model that is served.

    Args:
        engine: decodes; not started or stopped here, but `close` closes it.
        tokenizer: of the model. Its chat template is used where it has one; else the messages are joined by blank lines.
        name: what the model is called on the page and in the API.
        max_prompt_tokens: longest prompt; None for what the context holds.
        max_new_tokens: longest answer.

    Attributes:
        context: tokens that prompt and answer share.
        max_prompt_tokens: longest prompt, at most `context` - 1.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        name: str,
        *,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.context = int(engine.decoder.target.context)
        self.max_prompt_tokens = min(max_prompt_tokens or self.context - 1, self.context - 1)
        self.max_new_tokens = min(max_new_tokens, self.context - 1)
        self.closed = False
        self._lock = threading.Lock()  # tokenizers keep settings of a call in the object

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it is."""
        with self._lock:
            return list(self.tokenizer(text)["input_ids"])

    def chat(self, messages: Sequence[dict[str, str]], room: int, cut: bool = True) -> Encoded:
        """Token ids of a conversation, by the model's own chat template.

        The oldest exchanges (a message of the user's and the answers to it) are left out when there is no place for
        them; the system prompt and the newest message never are.

        Args:
            messages: with `role` (`system`, `user`, `assistant`) and `content`, oldest first.
            room: tokens that the answer should have; of this, at most half of the context is kept free.
            cut: leave out what does not fit; else such a conversation is an error.

        Raises:
            PromptTooLongError: the system prompt and the newest message alone do not fit, or with `cut=False` the whole
                conversation does not.
            MedheadError: no messages, or the template refuses them.
        """
        if not messages:
            raise MedheadError("there are no messages")
        if not cut:
            ids = self._template(list(messages))
            self._check_length(ids)
            return Encoded(ids)
        fits = min(self.max_prompt_tokens, self.context - max(1, min(room, self.context // 2)))
        system, exchanges = split_exchanges(messages)
        kept, ids = self._most_that_fit(system, exchanges, fits)
        self._check_length(ids)
        return Encoded(ids, sum(map(len, exchanges[: len(exchanges) - kept])))

    def request(self, prompt: list[int], max_new_tokens: int | None = None, **fields: Any) -> Request:
        """A request within the limits.

        Args:
            prompt: token ids.
            max_new_tokens: longest answer; None for as much as is allowed.
            fields: further fields of `Request`.

        Raises:
            PromptTooLongError: the prompt is longer than allowed.
            MedheadError: the answer may not be so long.
        """
        self._check_length(prompt)
        asked = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= asked <= self.max_new_tokens:
            raise MedheadError(f"the longest answer must be 1 to {self.max_new_tokens} tokens, got {asked}")
        return Request(prompt=prompt, max_new_tokens=min(asked, self.context - len(prompt)), **fields)

    def close(self) -> None:
        """End what is being decoded, and the engine."""
        self.closed = True
        self.engine.close()

    # ---------------------------------------------------------------- inside

    def _check_length(self, ids: list[int]) -> None:
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, at most {self.max_prompt_tokens} fit (the context is {self.context})"
            )

    def _most_that_fit(
        self, system: list[dict[str, str]], exchanges: list[list[dict[str, str]]], fits: int
    ) -> tuple[int, list[int]]:
        """The most newest exchanges, at least one, of at most `fits` tokens; and their ids."""

        def read(count: int) -> list[int]:
            return self._template([*system, *(message for part in exchanges[-count:] for message in part)])

        low, best, high = 1, read(len(exchanges)), len(exchanges)
        if len(best) <= fits:
            return high, best
        best = read(1)
        while low < high - 1:  # low is taken, high is too many
            middle = (low + high) // 2
            ids = read(middle)
            if len(ids) <= fits:
                low, best = middle, ids
            else:
                high = middle
        return low, best

    def _template(self, messages: list[dict[str, str]]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode("\n\n".join(message["content"] for message in messages))
        try:
            with self._lock:
                read = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())[:200]
            raise MedheadError(f"the model's chat template refuses these messages: {reason}") from None
        return list(read["input_ids"])


def split_exchanges(
    messages: Sequence[dict[str, str]],
) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]]:
    """The system prompt at the beginning, and the rest by exchanges: a message of the user's and what follows it."""
    start = 0
    while start < len(messages) - 1 and messages[start]["role"] == "system":
        start += 1
    exchanges: list[list[dict[str, str]]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:start]), exchanges
