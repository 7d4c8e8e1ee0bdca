"""Conversations and the operations on them; no function changes its arguments.

A conversation is plain JSON, because the browser stores it:
`{"id", "title", "updated", "settings", "messages": [message, ...], "tree"}`. A user message has `role` and `content`. An
answer also has `tokens` (pairs of text and source), `lengths` (number of tokens of every pass), `summary` (one line of
statistics), `dropped` (number of older messages that did not fit the context) and `note` (how it ended, if not by itself).
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from medhead.errors import MedheadError

Conversation = dict[str, Any]
Message = dict[str, Any]
TITLE_LENGTH = 48
MAX_MESSAGES = 2000
MAX_CHARACTERS = 400_000  # of one message


def new_conversation() -> Conversation:
    """Return an empty conversation with a new id."""
    return {"id": uuid.uuid4().hex[:12], "title": "", "updated": 0, "settings": {}, "messages": [], "tree": None}


def add_message(conversation: Conversation, text: str) -> Conversation:
    """Add a user message."""
    if not text.strip():
        raise MedheadError("the message is empty: write something first")
    return _with_messages(conversation, [*conversation["messages"], {"role": "user", "content": text.strip()}])


def edit_message(conversation: Conversation, index: int, text: str) -> Conversation:
    """Replace the user message at `index`, and remove the messages after it."""
    messages = conversation["messages"]
    if not 0 <= index < len(messages) or messages[index]["role"] != "user":
        raise MedheadError("only your own messages can be edited")
    return add_message({**conversation, "messages": messages[:index]}, text)


def undo_message(conversation: Conversation) -> tuple[Conversation, str]:
    """Remove the last user message and its answer; also return the text of that message, '' if there is none."""
    messages = conversation["messages"]
    last = _last_user_message(messages)
    if last is None:
        return conversation, ""
    return _with_messages(conversation, messages[:last]), messages[last]["content"]


def remove_answer(conversation: Conversation) -> Conversation:
    """Remove the last answer, so that another one can be generated."""
    last = _last_user_message(conversation["messages"])
    if last is None:
        raise MedheadError("there is no message to answer yet")
    return _with_messages(conversation, conversation["messages"][: last + 1])


def clear_messages(conversation: Conversation) -> Conversation:
    """Remove all messages."""
    return {**_with_messages(conversation, []), "tree": None}


def set_answer(conversation: Conversation, answer: Message, tree: dict[str, Any] | None = None) -> Conversation:
    """Add an answer to the last user message, or replace the answer it has."""
    messages = conversation["messages"]
    kept = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    return {**_with_messages(conversation, [*kept, answer]), "tree": tree or conversation.get("tree")}


def prompt_messages(conversation: Conversation, system: str = "") -> list[dict[str, str]]:
    """Return role and content of the messages for the chat template, after the system prompt if there is one."""
    first = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return first + [
        {"role": message["role"], "content": message["content"]}
        for message in conversation["messages"]
        if message["content"] or message["role"] == "user"
    ]


def pass_lengths(conversation: Conversation) -> list[int]:
    """Return the number of tokens of every pass of all answers."""
    return [length for message in conversation["messages"] for length in message.get("lengths", [])]


def parse_conversation(raw: Any) -> Conversation:
    """Return a conversation sent by a browser without its invalid parts, or a new one if it is none."""
    empty = new_conversation()
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        return empty
    messages = [message for each in raw["messages"][-MAX_MESSAGES:] if (message := _parse_message(each)) is not None]
    name, settings = raw.get("id"), raw.get("settings")
    return {
        "id": name[:40] if isinstance(name, str) and name.isalnum() else empty["id"],
        "title": _title(messages),
        "updated": raw["updated"] if isinstance(raw.get("updated"), (int, float)) else 0,
        "settings": dict(settings) if isinstance(settings, dict) else {},
        "messages": messages,
        "tree": raw["tree"] if isinstance(raw.get("tree"), dict) else None,
    }


def _parse_message(raw: Any) -> Message | None:
    if not isinstance(raw, dict) or raw.get("role") not in ("user", "assistant"):
        return None
    if not isinstance(raw.get("content"), str):
        return None
    message: Message = {"role": raw["role"], "content": raw["content"][:MAX_CHARACTERS]}
    if raw["role"] == "user":
        return message
    tokens, lengths = (raw[name] if isinstance(raw.get(name), list) else [] for name in ("tokens", "lengths"))
    message["tokens"] = [[pair[0], pair[1]] for pair in tokens if _is_pair(pair)]
    message["lengths"] = [length for length in lengths if type(length) is int and length > 0]
    message["dropped"] = raw["dropped"] if type(raw.get("dropped")) is int else 0
    for name in ("summary", "note"):
        message[name] = raw[name][:200] if isinstance(raw.get(name), str) else ""
    return message


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def _with_messages(conversation: Conversation, messages: list[Message]) -> Conversation:
    return {**conversation, "messages": messages, "title": _title(messages), "updated": int(time.time() * 1000)}


def _title(messages: list[Message]) -> str:
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    line = " ".join(first.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def _last_user_message(messages: list[Message]) -> int | None:
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
