"""Responses in OpenAI's format, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from medhead.serving.handle import RequestHandle
from medhead.serving.logprobs import TokenLogprobs
from medhead.serving.request import Result, StepOutput
from medhead_app.api.choices import Answer, best_answers
from medhead_app.api.errors import ApiError
from medhead_app.api.logprobs import TokenTexts, chat_logprobs, completion_logprobs
from medhead_app.api.tools.answer import ToolAnswer
from medhead_app.api.tools.plan import ToolPlan

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
    """Builds the response to one request; `include_usage` ends a stream with a chunk of token counts.

    Several choices have their statistics each, in the field `medhead` of the choice; that of one choice is the response's.
    """

    endpoint: Endpoint
    model: str
    handles: list[RequestHandle]  # every prompt's candidates after each other
    candidates: int = 1  # texts that are produced for every prompt
    n: int = 1  # choices of every prompt
    include_usage: bool = False
    texts: TokenTexts | None = None  # for log probabilities; None sends none
    echoes: list[str] = field(default_factory=list)  # what the choices of every prompt begin with; empty for nothing
    plan: ToolPlan | None = None  # of a chat whose answers may call tools
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    end_event: str = "data: [DONE]\n\n"

    def __post_init__(self) -> None:
        self._offsets = [0] * len(self.handles)  # where the next token of each begins; nothing is echoed with them
        self._tools = [] if self.plan is None else [ToolAnswer(self.plan) for _ in self.handles]

    def response(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the whole response from the answers of all candidates."""
        chosen = best_answers(answers, self.candidates, self.n)
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(chosen)]
        own = {"medhead": statistics(chosen[0].result)} if len(chosen) == 1 else {}
        return self._body(self.endpoint.object, choices) | {"usage": self._usage()} | own

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks before the text: a chat begins with the role, a completion with what is echoed."""
        if self.endpoint is CHAT:
            return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self.handles))]
        return [self._chunk(i, {"content": self._echo(i)}) for i in range(len(self.handles)) if self.echoes]

    def output_chunks(self, index: int, output: StepOutput) -> list[dict[str, Any]]:
        """Return the chunks of what a pass emitted for a choice."""
        if not output.text and not output.logprobs:
            return []
        deltas: list[dict[str, Any]] = [{"content": output.text}]
        if self._tools:
            tools = self._tools[index]
            deltas = [tools.chat_delta(delta) for delta in tools.add(output.text)] or ([{}] if output.logprobs else [])
        logprobs = [self._logprobs(index, output.logprobs), *[None] * len(deltas)]
        return [self._chunk(index, delta, logprobs=logprobs[i]) for i, delta in enumerate(deltas)]

    def end_chunks(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks at the end of a choice: finish reason and statistics."""
        result, tools = self.handles[index].result, self._tools[index] if self._tools else None
        rest = [] if tools is None else [self._chunk(index, tools.chat_delta(delta)) for delta in tools.finish()]
        return [*rest, self._chunk(index, {}, _finish_reason(result, tools)) | {"medhead": statistics(result)}]

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks after all choices: the token counts if included."""
        return [self._body(self.endpoint.chunk_object, []) | {"usage": self._usage()}] if self.include_usage else []

    def error_chunk(self, error: ApiError) -> dict[str, Any]:
        """Return the chunk that ends a stream with an error."""
        return error.body()

    def _whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        tools = None
        if self.endpoint is CHAT:
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if self.plan is not None:
                tools = ToolAnswer(self.plan)
                tools.add(answer.text)
                tools.finish()
                message |= tools.message()
            content: dict[str, Any] = {"message": message}
        else:
            content = {"text": self._echo(index * self.candidates // self.n) + answer.text}
        logprobs = self._logprobs(index, answer.logprobs)
        choice = self._choice(index, content, _finish_reason(answer.result, tools), logprobs)
        own = {"medhead": statistics(answer.result)} if len(self.handles) // self.candidates * self.n > 1 else {}
        return choice | own

    def _usage(self) -> dict[str, Any]:
        once = [handle.result for handle in self.handles[:: self.candidates]]  # a prompt counts once
        prompt, cached = sum(one.prompt_tokens for one in once), sum(one.cached_tokens for one in once)
        new = sum(handle.result.new_tokens for handle in self.handles)
        usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return usage | {"prompt_tokens_details": {"cached_tokens": cached}}

    def _echo(self, index: int) -> str:
        """Return what the text of a candidate begins with."""
        return self.echoes[index // self.candidates] if self.echoes else ""

    def _logprobs(self, index: int, logprobs: list[TokenLogprobs]) -> dict[str, Any] | None:
        if self.texts is None:
            return None
        if self.endpoint is CHAT:
            return chat_logprobs(self.texts, logprobs)
        found = completion_logprobs(self.texts, logprobs, self._offsets[index])
        self._offsets[index] += sum(map(len, found["tokens"]))
        return found

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return a chunk; `delta` is what it adds to a message."""
        content: dict[str, Any] = {"delta": delta} if self.endpoint is CHAT else {"text": delta.get("content", "")}
        choice = self._choice(index, content, finish_reason, logprobs)
        return self._body(self.endpoint.chunk_object, [choice]) | ({"usage": None} if self.include_usage else {})

    def _choice(
        self, index: int, content: dict[str, Any], finish_reason: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"index": index, "logprobs": logprobs, "finish_reason": finish_reason, **content}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.endpoint.id_prefix + self.id
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _finish_reason(result: Result, tools: ToolAnswer | None = None) -> str:
    return FINISH_REASONS.get(result.reason, "tool_calls" if tools is not None and tools.calls else "stop")


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
