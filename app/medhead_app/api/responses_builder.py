"""Responses of `/v1/responses`, whole and as OpenAI's named events."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from medhead.serving.handle import RequestHandle
from medhead.serving.request import StepOutput
from medhead_app.api.choices import Answer
from medhead_app.api.errors import ApiError
from medhead_app.api.responses import FINISH_REASONS, statistics
from medhead_app.api.responses_schema import ResponsesRequest

Chunks = list[dict[str, Any]]


@dataclass
class ResponsesBuilder:
    """Builds the response to one request: one message with one text."""

    body: ResponsesRequest
    handle: RequestHandle
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    end_event: str = ""  # `response.completed` is the last event

    def __post_init__(self) -> None:
        self._text = ""  # so far, in a stream
        self._events = 0

    def response(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the whole response."""
        self._text = answers[0].text
        return self._ended()

    def first_chunks(self) -> Chunks:
        """Return the events before the text."""
        begun = self._object("in_progress", [])
        return [
            self._event("created", response=begun),
            self._event("in_progress", response=begun),
            self._event("output_item.added", output_index=0, item=self._message("in_progress", [])),
            self._part_event("content_part.added", part=_part("")),
        ]

    def output_chunks(self, index: int, output: StepOutput) -> Chunks:
        """Return the event of the text that a pass added."""
        self._text += output.text
        return [self._part_event("output_text.delta", delta=output.text, logprobs=[])] if output.text else []

    def end_chunks(self, index: int) -> Chunks:
        """Return the events at the end of the text."""
        ended = self._ended()
        return [
            self._part_event("output_text.done", text=self._text, logprobs=[]),
            self._part_event("content_part.done", part=_part(self._text)),
            self._event("output_item.done", output_index=0, item=ended["output"][0]),
            self._event(ended["status"], response=ended),
        ]

    def last_chunks(self) -> Chunks:
        """Return no event: there is one text."""
        return []

    def error_chunk(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream with an error."""
        failed = self._object("failed", []) | {"error": {"code": "server_error", "message": error.message}}
        return self._event("failed", response=failed)

    def _ended(self) -> dict[str, Any]:
        result = self.handle.result
        cut = FINISH_REASONS.get(result.reason) == "length"
        status = "incomplete" if cut else "completed"
        ended = self._object(status, [self._message(status, [_part(self._text)])])
        prompt, new = result.prompt_tokens, result.new_tokens
        ended["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": result.cached_tokens},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        }
        details = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
        return ended | details | {"medhead": statistics(result)}

    def _object(self, status: str, output: Chunks) -> dict[str, Any]:
        body, params = self.body, self.handle.request.params
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _message(self, status: str, content: Chunks) -> dict[str, Any]:
        message = {"id": f"msg_{self.id}", "type": "message", "role": "assistant"}
        return message | {"status": status, "content": content}

    def _part_event(self, name: str, **fields: Any) -> dict[str, Any]:
        return self._event(name, item_id=f"msg_{self.id}", output_index=0, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{name}", "sequence_number": self._events - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
