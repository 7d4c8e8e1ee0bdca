"""The body of `/v1/responses`, for text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from medhead_app.api.messages import Message, for_template
from medhead_app.api.schema import GenerationRequest

_TEXT_PARTS = ("input_text", "output_text")
_STATE = ("id", "status", "type")  # fields of an earlier answer that is sent back


def _to_messages(given: Any) -> Any:
    """Return a list of messages, from a text or from OpenAI's list of items."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ValueError("must be a string or a list of messages")
    return [_to_message(index, item) for index, item in enumerate(given)]


def _to_message(index: int, item: Any) -> Any:
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        kind = item.get("type") if isinstance(item, dict) else type(item).__name__
        raise ValueError(f"item {index} must be a message, got {kind!r}"[:120] + "; this server reads only text")
    kept = {name: value for name, value in item.items() if name not in _STATE and value not in (None, [])}
    if isinstance(kept.get("content"), list):
        kept["content"] = [_to_part(part) for part in kept["content"]]
    return kept


def _to_part(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return part | {"type": "text"}
    return part


class ResponsesRequest(GenerationRequest):
    """Body of `/v1/responses`; the server keeps no state between requests."""

    left_out: ClassVar[tuple[str, ...]] = ("max_tokens", "n", "response_format", "stream_options")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("conversation", "max_tool_calls", "previous_response_id", "prompt", "reasoning"), ()),
        **dict.fromkeys(("background", "store"), (False,)),
        **dict.fromkeys(("include", "tools"), ([],)),
        "parallel_tool_calls": (True, False),
        "stream_options": ({}, {"include_obfuscation": False}),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none", "auto"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[list[Message], BeforeValidator(_to_messages), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    metadata: dict[str, str] | None = None

    def token_limit(self) -> tuple[str, int | None]:
        """Return the name and the value of the field that limits the answer."""
        return "max_output_tokens", self.max_output_tokens

    def template_messages(self) -> list[dict[str, str]]:
        """Return the messages for the chat template: the instructions first, as the system's."""
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        return for_template([*first, *self.input])
