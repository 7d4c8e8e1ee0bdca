"""A conversation as the page keeps it, and what can be done to it. Nothing here changes its arguments.

A conversation is plain JSON, because the browser keeps it:
`{"id", "title", "updated", "settings", "messages": [message, ...], "tree"}`. A user's message has `role` and `content`;
an answer also has `tokens` (pairs of text and source), `lengths` (tokens of every pass), `facts` (one line about how it
was made), `dropped` (older messages the model did not see) and `note` (how it ended, if not by itself).
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from medhead.errors import MedheadError

Conversation = dict[str, Any]
Message = dict[str, Any]
TITLE_LENGTH = 48
MOST_MESSAGES = 2000
MOST_CHARACTERS = 400_000  # of one message, whoever sends it


def new_conversation() -> Conversation:
    """An empty one, with an id of its own."""
    return {"id": uuid.uuid4().hex[:12], "title": "", "updated": 0, "settings": {}, "messages": [], "tree": None}


def send(conversation: Conversation, text: str) -> Conversation:
    """With one more message of the user's.

    Raises:
        MedheadError: the text is empty.
    """
    if not text.strip():
        raise MedheadError("the message is empty: write something first")
    messages = [*conversation["messages"], {"role": "user", "content": text.strip()}]
    return _changed(conversation, messages)


def edit(conversation: Conversation, index: int, text: str) -> Conversation:
    """With another text for the user's message at `index`; what came after it is gone.

    Raises:
        MedheadError: there is no such message of the user's, or the text is empty.
    """
    messages = conversation["messages"]
    if not 0 <= index < len(messages) or messages[index]["role"] != "user":
        raise MedheadError("only your own messages can be edited")
    return send({**conversation, "messages": messages[:index]}, text)


def undo(conversation: Conversation) -> tuple[Conversation, str]:
    """Without the last message of the user's and its answer; and that message, to be written anew ('' if none is left)."""
    messages = conversation["messages"]
    last = _last_of_user(messages)
    if last is None:
        return conversation, ""
    return _changed(conversation, messages[:last]), messages[last]["content"]


def regenerate(conversation: Conversation) -> Conversation:
    """Without the last answer, so that another can follow.

    Raises:
        MedheadError: there is no message to answer.
    """
    last = _last_of_user(conversation["messages"])
    if last is None:
        raise MedheadError("there is no message to answer yet")
    return _changed(conversation, conversation["messages"][: last + 1])


def cleared(conversation: Conversation) -> Conversation:
    """Without messages."""
    return {**_changed(conversation, []), "title": "", "tree": None}


def with_answer(conversation: Conversation, answer: Message, tree: dict[str, Any] | None = None) -> Conversation:
    """With an answer to the last message, in place of an earlier state of that answer."""
    messages = conversation["messages"]
    kept = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return {**_changed(conversation, [*kept, answer]), "tree": tree or conversation.get("tree")}


def prompt_messages(conversation: Conversation, system: str = "") -> list[dict[str, str]]:
    """What the model reads: role and content alone, the system prompt first where there is one."""
    first = [{"role": "system", "content": system.strip()}] if system.strip() else []
    said = [message for message in conversation["messages"] if message["content"] or message["role"] == "user"]
    return first + [{"role": message["role"], "content": message["content"]} for message in said]


def accepted_lengths(conversation: Conversation) -> list[int]:
    """Tokens of every pass of all answers."""
    return [length for message in conversation["messages"] for length in message.get("lengths", [])]


def checked(raw: Any) -> Conversation:
    """A conversation that comes from a browser, with everything unexpected left out; a new one if it is none at all."""
    empty = new_conversation()
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        return empty
    messages = [found for each in raw["messages"][-MOST_MESSAGES:] if (found := _checked_message(each)) is not None]
    name = raw.get("id")
    settings = raw.get("settings")
    return {
        "id": name[:40] if isinstance(name, str) and name.isalnum() else empty["id"],
        "title": _title(messages),
        "updated": raw["updated"] if isinstance(raw.get("updated"), (int, float)) else 0,
        "settings": dict(settings) if isinstance(settings, dict) else {},
        "messages": messages,
        "tree": raw["tree"] if isinstance(raw.get("tree"), dict) else None,
    }


def _checked_message(raw: Any) -> Message | None:
    if not isinstance(raw, dict) or raw.get("role") not in ("user", "assistant"):
        return None
    if not isinstance(raw.get("content"), str):
        return None
    message: Message = {"role": raw["role"], "content": raw["content"][:MOST_CHARACTERS]}
    if raw["role"] == "user":
        return message
    tokens, lengths = _list(raw.get("tokens")), _list(raw.get("lengths"))
    message["tokens"] = [[pair[0], pair[1]] for pair in tokens if _is_pair(pair)]
    message["lengths"] = [length for length in lengths if type(length) is int and length > 0]
    message["dropped"] = raw["dropped"] if type(raw.get("dropped")) is int else 0
    for name in ("facts", "note"):
        message[name] = raw[name][:200] if isinstance(raw.get(name), str) else ""
    return message


def _list(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else []


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def _changed(conversation: Conversation, messages: list[Message]) -> Conversation:
    return {**conversation, "messages": messages, "title": _title(messages), "updated": int(time.time() * 1000)}


def _title(messages: list[Message]) -> str:
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    line = " ".join(first.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def _last_of_user(messages: list[Message]) -> int | None:
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
