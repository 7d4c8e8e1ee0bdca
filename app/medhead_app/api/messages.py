"""Messages of a conversation, those of tools too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Tag, ValidationInfo

from medhead.errors import MedheadError
from medhead_app.api.strict import StrictModel
from medhead_app.images import ImageFile, read_data_url

_PARSED = ("parsed", "parsed_arguments")  # what `parse` of the official client adds to answers
KIND = "@"  # begins the names of kinds of messages, which are no part of a field's path


def _join_parts(content: Any) -> Any:
    """Join a list of text parts."""
    if not isinstance(content, list):
        return content
    parts = [_read_part(index, part) for index, part in enumerate(content)]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise ValueError("only messages of the role user may have images")
    return "\n".join(texts)


def _read_content(content: Any, info: ValidationInfo) -> Any:
    """Return a text, or texts and images where a user's message has images."""
    parts = content if isinstance(content, list) and info.data.get("role") == "user" else _join_parts(content)
    if not isinstance(parts, list | str):
        raise ValueError("Input should be a valid string")
    if isinstance(parts, str):
        return parts
    parts = [_read_part(index, part) for index, part in enumerate(parts)]
    return parts if any(isinstance(part, ImageFile) for part in parts) else "\n".join(parts)


def _read_part(index: int, part: Any) -> str | ImageFile:
    given = {name: value for name, value in part.items() if value not in (None, [])} if isinstance(part, dict) else {}
    if given.get("type") == "image_url" and set(given) == {"type", "image_url"}:
        try:
            return read_data_url(_url(given["image_url"]))
        except MedheadError as error:
            raise ValueError(f"part {index}: {error}") from None
    if given.get("type") != "text" or set(given) != {"type", "text"} or not isinstance(given["text"], str):
        forms = "{type: text, text: ...} or {type: image_url, image_url: {url: data:image/png;base64,...}}"
        raise ValueError(f"part {index} must be {forms}; this server reads only text and images")
    return given["text"]


def _url(image: Any) -> str:
    """Return the URL of the field `image_url`; `detail` changes nothing."""
    fields = image if isinstance(image, dict) else {"url": image}
    if not isinstance(fields.get("url"), str) or not set(fields) <= {"url", "detail"}:
        raise MedheadError("image_url must be {url: data:image/png;base64,...}")
    return str(fields["url"])


def _read_arguments(arguments: Any) -> Any:
    """Return the object that templates write; a text that is none stays a text, because models may write such calls."""
    if not isinstance(arguments, str):
        raise ValueError("must be the JSON text of an object")
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


Text = Annotated[str, BeforeValidator(_join_parts)]


class Message(StrictModel):
    """A message with a text; a user's may have images."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, BeforeValidator(_read_content)]  # a text, or a list of texts and images
    name: str | None = None


class CalledFunction(StrictModel):
    """The function and the arguments of a call."""

    name: str
    arguments: Annotated[dict[str, Any] | str, BeforeValidator(_read_arguments)]


class ToolCall(StrictModel):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallsMessage(StrictModel):
    """An earlier answer with calls."""

    role: Literal["assistant"]
    content: Annotated[str, BeforeValidator(lambda content: _join_parts(content or ""))] = ""
    tool_calls: list[ToolCall]
    name: str | None = None


class ToolMessage(StrictModel):
    """The result of a call."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None


def _kind(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    if role == "tool":
        return "@tool"
    return "@calls" if isinstance(message, dict) and role == "assistant" and "tool_calls" in message else "@message"


AnyMessage = Annotated[
    Annotated[Message, Tag("@message")] | Annotated[CallsMessage, Tag("@calls")] | Annotated[ToolMessage, Tag("@tool")],
    Discriminator(_kind),
]


def without_empty(message: Any) -> Any:
    """Remove the empty fields that clients send back with an answer, and those that they add to it."""
    if isinstance(message, list):
        return [without_empty(one) for one in message]
    if not isinstance(message, dict):
        return message
    kept = {name: value for name, value in message.items() if name == "content" or value not in (None, [])}
    for name in _PARSED:
        kept.pop(name, None)
    return kept | {name: without_empty(kept[name]) for name in ("tool_calls", "function") if name in kept}


def for_template(messages: Sequence[AnyMessage]) -> list[dict[str, Any]]:
    """Return messages for the chat template, the developer's as the system's."""
    shown = [message.model_dump(exclude_none=True) | {"content": message.content} for message in messages]
    return [one | {"role": "system"} if one["role"] == "developer" else one for one in shown]
