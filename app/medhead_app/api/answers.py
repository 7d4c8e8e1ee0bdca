"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from medhead.serving.handle import RequestHandle
from medhead.serving.request import Result

FINISH = {"stop": "stop", "length": "length", "timeout": "length"}  # OpenAI knows no timeout; `medhead.reason` says it


@dataclass(frozen=True)
class Shape:
    """What differs between the endpoints.

    Attributes:
        endpoint: for metrics.
        whole: `object` of an answer.
        chunk: `object` of a chunk.
        prefix: of ids.
    """

    endpoint: str
    whole: str
    chunk: str
    prefix: str


CHAT = Shape("chat", "chat.completion", "chat.completion.chunk", "chatcmpl-")
COMPLETION = Shape("completions", "text_completion", "text_completion", "cmpl-")


@dataclass
class Answer:
    """One answer being given.

    Attributes:
        shape: of the endpoint.
        model: name of the model.
        ticket: of the request; its result is read when it has ended.
        include_usage: whether a stream ends with a chunk of usage counts.
    """

    shape: Shape
    model: str
    ticket: RequestHandle
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str) -> dict[str, Any]:
        """All at once."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": self._finish()}
        if self.shape is CHAT:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return self._head(self.shape.whole, [choice]) | {
            "usage": self.usage(),
            "medhead": statistics(self.ticket.result),
        }

    def first(self) -> list[dict[str, Any]]:
        """Chunks before the text: a chat says who speaks."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.shape is CHAT else []

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text})

    def last(self) -> list[dict[str, Any]]:
        """Chunks after the text: how it ended with the statistics, and usage if that was asked for."""
        ended = self._chunk({}, self._finish()) | {"medhead": statistics(self.ticket.result)}
        if not self.include_usage:
            return [ended]
        return [ended, self._head(self.shape.chunk, []) | {"usage": self.usage()}]

    def usage(self) -> dict[str, int]:
        """Token counts."""
        result = self.ticket.result
        prompt, new = result.prompt_tokens, result.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _finish(self) -> str:
        return FINISH.get(self.ticket.result.reason, "stop")

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.shape is CHAT:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        return self._head(self.shape.chunk, [choice]) | ({"usage": None} if self.include_usage else {})

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.shape.prefix + self.id
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def statistics(result: Result) -> dict[str, Any]:
    """The extension field `medhead`: what speculation did. Times are in seconds."""
    active = result.seconds - result.queued
    return {
        "reason": result.reason,
        "proposer": result.proposer,
        "passes": result.passes,
        "accepted_length": round(result.accepted_length, 4),
        "tokens_per_second": round(result.new_tokens / active, 2) if active > 0 else 0.0,
        "seconds": round(result.seconds, 4),
        "queued": round(result.queued, 4),
        "first_token": None if result.first_token is None else round(result.first_token, 4),
        "busy": round(result.busy, 4),
        "seed": result.seed,
    }
