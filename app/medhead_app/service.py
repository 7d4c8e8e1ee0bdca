"""The model, tokenizer, name and limits that the chat page and the API share."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from medhead.config import SamplingParams
from medhead.errors import MedheadError
from medhead.serving.engine import Engine
from medhead.serving.request import Request
from medhead_app.chat_encoder import ChatEncoder, ChatMessage, EncodedChat
from medhead_app.images import ImageFile


class PromptTooLongError(MedheadError):
    """The prompt does not fit the model's context, or is longer than the server allows."""


class Service:
    """One served model; see `ChatEncoder` for its chats."""

    def __init__(
        self,
        engine: Engine,  # a started one
        tokenizer: Any,
        name: str,  # of the model on the page and in the API
        *,
        max_prompt_tokens: int | None = None,  # longest prompt; None allows what the context holds
        max_new_tokens: int = 1024,  # longest answer
        tool_parser: str | None = None,  # name of the format of tool calls; None for that of the chat template
        processor: Any = None,  # of a model that takes images
    ) -> None:
        self.engine, self.tokenizer, self.name, self.tool_parser = engine, tokenizer, name, tool_parser
        self.context = int(engine.decoder.target.context)  # tokens that prompt and answer share
        self.max_prompt_tokens = min(max_prompt_tokens or self.context - 1, self.context - 1)
        self.max_new_tokens = min(max_new_tokens, self.context - 1)
        self.temperature = default_temperature(engine)  # of requests that give none
        self.created = int(time.time())  # when the server was started, in Unix time
        self.closed = False
        self.takes_images = processor is not None  # whether chats may hold images
        dtype = {} if processor is None else {"dtype": engine.decoder.target.dtype}
        self._encoder = ChatEncoder(tokenizer, processor, **dtype)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._encoder.encode_text(text)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        answer_tokens: int,
        truncate: bool = True,
        tools: Sequence[dict[str, Any]] = (),  # for the chat template, without truncate
    ) -> EncodedChat:
        """Return the token ids of a conversation in the model's chat template.

        With `truncate` the oldest exchanges (a user message and the answers to it) are left out when they do not fit. The
        system prompt and the newest user message are always kept. `answer_tokens` are kept free, at most half of the context.
        """
        if not messages:
            raise MedheadError("there are no messages")
        with self._encoder.decoded(messages) as images:  # once, however often the conversation is truncated
            if truncate:
                return self._encode_newest(messages, answer_tokens, images)
            encoded = self._encoder.encode(messages, tools, images)
        self._check_length(encoded.token_ids)
        return encoded

    def _encode_newest(
        self, messages: Sequence[ChatMessage], answer_tokens: int, images: Mapping[ImageFile, Any]
    ) -> EncodedChat:
        """Return a conversation without the oldest exchanges that do not fit, see `encode_chat`."""
        limit = min(self.max_prompt_tokens, self.context - max(1, min(answer_tokens, self.context // 2)))
        system, exchanges = split_exchanges(messages)

        def encode_newest(count: int) -> EncodedChat:
            newest = [*system, *(message for part in exchanges[-count:] for message in part)]
            return self._encoder.encode(newest, decoded=images)

        kept = len(exchanges)
        encoded = encode_newest(kept)
        if len(encoded.token_ids) > limit:
            kept = max(1, bisect_right(range(1, kept), limit, key=lambda count: len(encode_newest(count).token_ids)))
            encoded = encode_newest(kept)
        self._check_length(encoded.token_ids)
        return replace(encoded, dropped=sum(map(len, exchanges[: len(exchanges) - kept])))

    def request(
        self,
        prompt: list[int],
        max_new_tokens: int | None = None,
        *,
        proposer: str | None = None,
        tree_size: int | None = None,
        trace: bool = False,
        logprobs: int | None = None,
        special_tokens: tuple[int, ...] = (),
        cache_salt: str | None = None,
        model_inputs: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Request:
        """Build a request within the server's limits; `sampling` are the other fields of `SamplingParams`.

        Without `max_new_tokens` the answer may be as long as the limits allow.
        """
        self._check_length(prompt)
        tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= tokens <= self.max_new_tokens:
            raise MedheadError(f"max_new_tokens must be from 1 to {self.max_new_tokens} on this server, got {tokens}")
        params = SamplingParams(max_new_tokens=min(tokens, self.context - len(prompt)), **sampling)
        fields: dict[str, Any] = {"proposer": proposer, "tree_size": tree_size, "trace": trace, "logprobs": logprobs}
        fields["model_inputs"] = model_inputs or {}
        return Request(prompt, params, special_tokens=special_tokens, cache_salt=cache_salt, **fields)

    def close(self) -> None:
        """End all requests and close the engine."""
        self.closed = True
        self.engine.close()

    def _check_length(self, token_ids: list[int]) -> None:
        if len(token_ids) > self.max_prompt_tokens:
            limits = f"at most {self.max_prompt_tokens} fit (the context is {self.context})"
            raise PromptTooLongError(f"the prompt has {len(token_ids)} tokens, {limits}")


def default_temperature(engine: Engine) -> float:
    """Return the temperature of the model's generation configuration, 1 without one, as at OpenAI."""
    found = engine.decoder.target.model.generation_config.temperature
    return 1.0 if found is None else float(found)


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
