"""The model, tokenizer, name and limits that the chat page and the API share."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.serving.engine import Engine
from medhead.serving.request import Request

ChatMessage = dict[str, str]


class PromptTooLongError(MedheadError):
    """The prompt does not fit the model's context, or is longer than the server allows."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids, up to where the answer begins."""

    token_ids: list[int]
    dropped: int = 0  # number of oldest messages that were left out because they did not fit


class Service:
    """One served model.

    Args:
        engine: a started engine; `close` closes it.
        tokenizer: the model's tokenizer. Without a chat template, messages are joined by blank lines.
        name: name of the model on the page and in the API.
        max_prompt_tokens: longest prompt; None allows what the context holds.
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
        self._lock = threading.Lock()  # tokenizers keep the settings of a call in the object

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        with self._lock:
            return list(self.tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[ChatMessage], answer_tokens: int, truncate: bool = True) -> EncodedChat:
        """Return the token ids of a conversation in the model's chat template.

        The oldest exchanges (a user message and the answers to it) are left out when they do not fit. The system prompt
        and the newest user message are always kept.

        Args:
            messages: dictionaries with `role` (`system`, `user`, `assistant`) and `content`, oldest first.
            answer_tokens: tokens to keep free for the answer; at most half of the context is kept free.
            truncate: leave out what does not fit; otherwise raise an error.

        Raises:
            PromptTooLongError: the messages that must be kept do not fit.
            MedheadError: there are no messages, or the chat template refuses them.
        """
        if not messages:
            raise MedheadError("there are no messages")
        if not truncate:
            token_ids = self._apply_template(messages)
            self._check_length(token_ids)
            return EncodedChat(token_ids)
        limit = min(self.max_prompt_tokens, self.context - max(1, min(answer_tokens, self.context // 2)))
        system, exchanges = split_exchanges(messages)

        def encode_newest(count: int) -> list[int]:
            return self._apply_template([*system, *(message for part in exchanges[-count:] for message in part)])

        kept = len(exchanges)
        token_ids = encode_newest(kept)
        if len(token_ids) > limit:
            kept = max(1, bisect_right(range(1, kept), limit, key=lambda count: len(encode_newest(count))))
            token_ids = encode_newest(kept)
        self._check_length(token_ids)
        return EncodedChat(token_ids, sum(map(len, exchanges[: len(exchanges) - kept])))

    def request(
        self,
        prompt: list[int],
        max_new_tokens: int | None = None,
        *,
        proposer: str | None = None,
        tree_size: int | None = None,
        trace: bool = False,
        **sampling: Any,
    ) -> Request:
        """Build a request within the server's limits; `sampling` are the other fields of `SamplingParams`.

        Without `max_new_tokens` the answer may be as long as the limits allow.

        Raises:
            PromptTooLongError: the prompt is longer than the server allows.
            MedheadError: `max_new_tokens` is above the server's limit, or a sampling field is out of range.
        """
        self._check_length(prompt)
        tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= tokens <= self.max_new_tokens:
            raise MedheadError(f"max_new_tokens must be from 1 to {self.max_new_tokens} on this server, got {tokens}")
        params = SamplingParams(max_new_tokens=min(tokens, self.context - len(prompt)), **sampling)
        return Request(prompt, params, proposer=proposer, tree_size=tree_size, trace=trace)

    def close(self) -> None:
        """End all requests and close the engine."""
        self.closed = True
        self.engine.close()

    def _check_length(self, token_ids: list[int]) -> None:
        if len(token_ids) > self.max_prompt_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, at most {self.max_prompt_tokens} fit "
                f"(the context is {self.context})"
            )

    def _apply_template(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            return self.encode("\n\n".join(message["content"] for message in messages))
        try:
            with self._lock:
                encoded = self.tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, return_dict=True
                )
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())[:200]
            raise MedheadError(f"the model's chat template refuses these messages: {reason}") from None
        return list(encoded["input_ids"])


def split_exchanges(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[list[ChatMessage]]]:
    """Split messages into the leading system messages and exchanges: a user message and what follows it."""
    start = 0
    while start < len(messages) - 1 and messages[start]["role"] == "system":
        start += 1
    exchanges: list[list[ChatMessage]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not exchanges:
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:start]), exchanges
