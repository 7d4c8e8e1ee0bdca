"""The body of `/v1/responses`, for text and function tools."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from medhead_app.api.messages import AnyMessage, Message, for_template
from medhead_app.api.schema import GenerationRequest
from medhead_app.api.tools.plan import ToolRequest, new_tool_request
from medhead_app.api.tools.schema import FlatTools, ToolChoice

_TEXT_PARTS = ("input_text", "output_text")
_TOOL_ITEMS = {"function_call": {"call_id", "name", "arguments"}, "function_call_output": {"call_id", "output"}}
_IMAGE = {"type", "image_url", "detail"}
_STATE = ("id", "status", "type")  # fields of an earlier answer that is sent back


def _to_messages(given: Any) -> Any:
    """Return a list of messages, from a text or from OpenAI's list of items."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError("must be a string or a list of messages")
    messages: list[Any] = []
    for index, item in enumerate(given):
        message = _to_message(index, item)
        last = messages[-1] if messages else None
        if isinstance(last, dict) and "tool_calls" in last and "tool_calls" in message:
            last["tool_calls"] += message["tool_calls"]  # calls of one answer
        else:
            messages.append(message)
    return messages


def _to_message(index: int, item: Any) -> Any:
    kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
    if isinstance(item, dict) and kind in _TOOL_ITEMS:
        return _to_tool_message(index, item)
    if not isinstance(item, dict) or kind != "message":
        allowed = f"a message, {' or '.join(_TOOL_ITEMS)}"
        raise ValueError(
            f"item {index} must be {allowed}, got {kind!r}"[:160] + "; this server reads only text and images"
        )
    kept = {name: value for name, value in item.items() if name not in _STATE and value not in (None, [])}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_to_part(part) for part in kept["content"]]
    return kept


def _to_tool_message(index: int, item: dict[str, Any]) -> dict[str, Any]:
    """Return a call of an earlier answer, or its result."""
    kept = {name: value for name, value in item.items() if name not in _STATE and value not in (None, [])}
    needed = _TOOL_ITEMS[item["type"]]
    if set(kept) != needed:
        raise ValueError(
            f"item {index} ({item['type']}) must have {', '.join(sorted(needed))}, got {sorted(kept)}"[:200]
        )
    if "output" in needed:
        output = kept["output"]
        content = [_to_part(part) for part in output] if isinstance(output, list) else output
        return {"role": "tool", "tool_call_id": kept["call_id"], "content": content}
    function = {"name": kept["name"], "arguments": kept["arguments"]}
    return {"role": "assistant", "tool_calls": [{"id": kept["call_id"], "function": function}]}


def _to_part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return part | {"type": "text"}
    if isinstance(part, dict) and part.get("type") == "input_image" and not set(part) - _IMAGE:
        return {"type": "image_url", "image_url": part.get("image_url")}
    return part


class ResponsesRequest(GenerationRequest):
    """Body of `/v1/responses`; the server keeps no state between requests."""

    left_out: ClassVar[tuple[str, ...]] = ("max_tokens", "n", "response_format", "stream_options")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("conversation", "max_tool_calls", "previous_response_id", "prompt", "reasoning"), ()),
        **dict.fromkeys(("background", "store"), (False,)),
        "include": ([],),
        "stream_options": ({}, {"include_obfuscation": False}),
        "text": ({}, {"format": {"type": "text"}}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[list[AnyMessage], BeforeValidator(_to_messages), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    metadata: dict[str, str] | None = None
    tools: FlatTools = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and the value of the field that limits the answer."""
        return "max_output_tokens", self.max_output_tokens

    def tool_request(self) -> ToolRequest | None:
        """Return the tools that may be called, None where there are none."""
        return new_tool_request(self.tools, self.tool_choice, self.parallel_tool_calls, self.grammar())

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages for the chat template: the instructions first, as the system's."""
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        return for_template([*first, *self.input])
