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
from medhead_app.api.tools.answer import ToolAnswer
from medhead_app.api.tools.plan import ToolPlan
from medhead_app.api.tools.reader import Delta
from medhead_app.api.tools.schema import AllowedChoice, NamedChoice

Chunks = list[dict[str, Any]]


@dataclass
class ResponsesBuilder:
    """Builds the response to one request: messages with one text each, and calls of functions."""

    body: ResponsesRequest
    handle: RequestHandle
    plan: ToolPlan | None = None  # of an answer that may call tools
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    end_event: str = ""  # `response.completed` is the last event

    def __post_init__(self) -> None:
        self._tools = None if self.plan is None else ToolAnswer(self.plan)
        self._items = Chunks()  # the last one is open until the next begins
        self._call: int | None = None  # index of the call that is open
        self._events = 0

    def response(self, answers: list[Answer]) -> dict[str, Any]:
        """Return the whole response."""
        self.output_chunks(0, StepOutput([], answers[0].text))
        response: dict[str, Any] = self.end_chunks(0)[-1]["response"]
        return response

    def first_chunks(self) -> Chunks:
        """Return the events before the text."""
        begun = self._object("in_progress", [])
        return [self._event("created", response=begun), self._event("in_progress", response=begun)]

    def output_chunks(self, index: int, output: StepOutput) -> Chunks:
        """Return the events of the text that a pass added."""
        if not output.text:
            return []
        deltas = [Delta(output.text)] if self._tools is None else self._tools.add(output.text)
        return [event for delta in deltas for event in self._delta_events(delta)]

    def end_chunks(self, index: int) -> Chunks:
        """Return the events at the end of the text."""
        deltas = [] if self._tools is None else self._tools.finish()
        events = [event for delta in deltas for event in self._delta_events(delta)]
        if not self._items:
            events += self._begin(Delta(""))
        cut = FINISH_REASONS.get(self.handle.result.reason) == "length"
        events += self._end("incomplete" if cut else "completed")
        ended = self._ended(cut)
        return [*events, self._event(ended["status"], response=ended)]

    def last_chunks(self) -> Chunks:
        """Return no event: there is one text."""
        return []

    def error_chunk(self, error: ApiError) -> dict[str, Any]:
        """Return the event that ends a stream with an error."""
        failed = self._object("failed", []) | {"error": {"code": "server_error", "message": error.message}}
        return self._event("failed", response=failed)

    def _ended(self, cut: bool) -> dict[str, Any]:
        result = self.handle.result
        ended = self._object("incomplete" if cut else "completed", self._items)
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
            "parallel_tool_calls": body.parallel_tool_calls and bool(body.tools),
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": self._choice(),
            "tools": [{"description": None, **tool.model_dump()} for tool in body.tools],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _choice(self) -> Any:
        choice = self.body.tool_choice or "auto"
        if isinstance(choice, NamedChoice):
            return {"type": "function", "name": choice.name}
        if isinstance(choice, AllowedChoice):
            tools = [{"type": "function", "name": name} for name in choice.names]
            return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
        return choice if self.body.tools else "none"

    def _delta_events(self, delta: Delta) -> Chunks:
        """Return the events of a delta, which ends the open item where it belongs to another one."""
        events = Chunks()
        if not self._items or delta.call != self._call:
            events = (self._end("completed") if self._items else []) + self._begin(delta)
        item = self._items[-1]
        if delta.call is None:
            item["content"][0]["text"] += delta.text
            return [*events, self._part_event("output_text.delta", delta=delta.text, logprobs=[])]
        item["arguments"] += delta.text
        return [*events, self._item_event("function_call_arguments.delta", delta=delta.text)] if delta.text else events

    def _begin(self, delta: Delta) -> Chunks:
        """Return the events at the beginning of a message or a call."""
        self._call = delta.call
        id_and_status = {
            "id": f"{'msg' if delta.call is None else 'fc'}_{self.id}_{len(self._items)}",
            "status": "in_progress",
        }
        if delta.call is None:
            item: dict[str, Any] = {**id_and_status, "type": "message", "role": "assistant", "content": []}
        else:
            assert self._tools is not None
            call_id = self._tools.calls[delta.call]["id"]
            names = {"call_id": call_id, "name": delta.name, "arguments": ""}
            item = {**id_and_status, "type": "function_call", **names}
        self._items.append(item)
        events = [self._event("output_item.added", output_index=len(self._items) - 1, item=dict(item))]
        if delta.call is None:
            events.append(self._part_event("content_part.added", part=_part("")))
            item["content"] = [_part("")]
        return events

    def _end(self, status: str) -> Chunks:
        """Return the events at the end of a message or a call."""
        item = self._items[-1]
        item["status"] = status
        if self._call is None:
            part = item["content"][0]
            events = [
                self._part_event("output_text.done", text=part["text"], logprobs=[]),
                self._part_event("content_part.done", part=part),
            ]
        else:
            events = [self._item_event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])]
        return [*events, self._event("output_item.done", output_index=len(self._items) - 1, item=item)]

    def _item_event(self, event: str, **fields: Any) -> dict[str, Any]:
        return self._event(event, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _part_event(self, event: str, **fields: Any) -> dict[str, Any]:
        return self._item_event(event, content_index=0, **fields)

    def _event(self, event: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": f"response.{event}", "sequence_number": self._events - 1, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
