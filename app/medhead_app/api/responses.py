"""Responses in OpenAI's format, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from medhead.serving.handle import RequestHandle
from medhead.serving.request import Result

FINISH_REASONS = {"length": "length", "timeout": "length"}  # OpenAI has no timeout; `medhead.reason` tells it


@dataclass(frozen=True)
class Endpoint:
    """What differs between the two endpoints."""

    name: str  # label in the metrics
    object: str  # the field `object` of a whole response
    chunk_object: str  # the field `object` of a chunk
    id_prefix: str  # of response ids


CHAT = Endpoint("chat", "chat.completion", "chat.completion.chunk", "chatcmpl-")
COMPLETIONS = Endpoint("completions", "text_completion", "text_completion", "cmpl-")


@dataclass
class ResponseBuilder:
    """Builds the response to one request; `include_usage` ends a stream with a chunk of token counts."""

    endpoint: Endpoint
    model: str
    handle: RequestHandle
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, text: str) -> dict[str, Any]:
        """Return the whole response."""
        if self.endpoint is CHAT:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            content = {"text": text}
        body = self._body(self.endpoint.object, [self._choice(content, self._finish_reason())])
        return body | {"usage": self._usage(), "medhead": statistics(self.handle.result)}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks before the text: a chat begins with the role."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.endpoint is CHAT else []

    def text_chunk(self, text: str) -> dict[str, Any]:
        """Return a chunk of text."""
        return self._chunk({"content": text})

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks after the text: finish reason and statistics, and the token counts if included."""
        chunk = self._chunk({}, self._finish_reason()) | {"medhead": statistics(self.handle.result)}
        usage = self._body(self.endpoint.chunk_object, []) | {"usage": self._usage()}
        return [chunk, usage] if self.include_usage else [chunk]

    def _usage(self) -> dict[str, int]:
        prompt, new = self.handle.result.prompt_tokens, self.handle.result.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _finish_reason(self) -> str:
        return FINISH_REASONS.get(self.handle.result.reason, "stop")

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self.endpoint is CHAT else {"text": delta.get("content", "")}
        body = self._body(self.endpoint.chunk_object, [self._choice(content, finish_reason)])
        return body | ({"usage": None} if self.include_usage else {})

    def _choice(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "logprobs": None, "finish_reason": finish_reason, **content}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.endpoint.id_prefix + self.id
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def statistics(result: Result) -> dict[str, Any]:
    """Return the extension field `medhead`, the statistics of a request; times are in seconds."""
    active = result.seconds - result.queued
    return {
        "reason": result.reason,
        "proposer": result.proposer,
        "passes": result.passes,
        "accepted_length": round(result.accepted_length, 4),
        "tokens_per_second": round(result.new_tokens / active, 2) if active > 0 else 0.0,
        "seconds": round(result.seconds, 4),
        "queue_time": round(result.queued, 4),
        "time_to_first_token": None if result.first_token is None else round(result.first_token, 4),
        "service_time": round(result.busy, 4),
        "seed": result.seed,
    }
