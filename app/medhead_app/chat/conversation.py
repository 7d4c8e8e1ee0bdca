"""Conversations and the operations on them; no function changes its arguments.

A conversation is plain JSON, because the browser stores it:
`{"id", "title", "updated", "settings", "messages": [message, ...]}`, and `removed`, the messages before the last removal,
which are not stored. A user message has `role` and `content`. An answer also has

- `tokens` (pairs of text and source), `token_ids`, `lengths` (number of tokens of every pass), `seconds` (of decoding), `seed`;
- `tree` (the last one with draft tokens), `summary` (one line of statistics), `dropped` (number of older messages that did
  not fit the context) and `note` (how it ended, if not by itself);
- `earlier` and `later`: its other versions in the order in which they were generated.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from medhead.errors import MedheadError

Conversation = dict[str, Any]
Message = dict[str, Any]
TITLE_LENGTH = 48
MAX_CHARACTERS = 400_000  # of one message
LISTS = ("tokens", "token_ids", "lengths", "earlier", "later")  # of an answer


def new_conversation() -> Conversation:
    """Return an empty conversation with a new id."""
    return {"id": uuid.uuid4().hex[:12], "title": "", "updated": 0, "settings": {}, "messages": []}


def add_message(conversation: Conversation, text: str) -> Conversation:
    """Add a user message."""
    if not text.strip():
        raise MedheadError("the message is empty: write something first")
    if len(text) > MAX_CHARACTERS:
        raise MedheadError(f"the message has {len(text)} characters, at most {MAX_CHARACTERS} are allowed: shorten it")
    return _with_messages(conversation, [*conversation["messages"], {"role": "user", "content": text.strip()}])


def edit_message(conversation: Conversation, index: int, text: str) -> Conversation:
    """Replace the user message at `index`, and remove the messages after it."""
    messages = conversation["messages"]
    if not 0 <= index < len(messages) or messages[index]["role"] != "user":
        raise MedheadError("only your own messages can be edited")
    return {**add_message({**conversation, "messages": messages[:index]}, text), "removed": messages}


def undo_message(conversation: Conversation) -> tuple[Conversation, str]:
    """Remove the last user message and its answer; also return the text of that message, '' if there is none."""
    messages = conversation["messages"]
    last = _last_user_message(messages)
    if last is None:
        return conversation, ""
    return _with_messages(conversation, messages[:last], removed=messages), messages[last]["content"]


def clear_messages(conversation: Conversation) -> Conversation:
    """Remove all messages."""
    return _with_messages(conversation, [], removed=conversation["messages"])


def restore_messages(conversation: Conversation) -> Conversation:
    """Undo the last removal of messages: that of `undo_message`, `clear_messages` or `edit_message`.

    Messages that were added since then are removed, and can be restored in their turn.
    """
    now, before = conversation["messages"], conversation.get("removed") or conversation["messages"]
    return _with_messages(conversation, before, removed=None if now == before[: len(now)] else now)


def new_version(conversation: Conversation) -> Conversation:
    """Make the last answer an earlier version of an answer that is empty; without an answer nothing changes."""
    messages = conversation["messages"]
    if _last_user_message(messages) is None:
        raise MedheadError("there is no message to answer yet")
    if messages[-1]["role"] == "user":
        return conversation
    versions = [*messages[-1].get("earlier", []), _one_version(messages[-1]), *messages[-1].get("later", [])]
    return _with_messages(conversation, [*messages[:-1], {"role": "assistant", "content": "", "earlier": versions}])


def show_version(conversation: Conversation, step: int) -> Conversation:
    """Show the earlier (`step` -1) or later (1) version of the last answer."""
    messages = conversation["messages"]
    if not messages or messages[-1]["role"] != "assistant" or step not in (-1, 1):
        return conversation
    shown = messages[-1]
    earlier, later = list(shown.get("earlier", [])), list(shown.get("later", []))
    source, other = (earlier, later) if step < 0 else (later, earlier)
    if not source:
        return conversation
    other.insert(0 if step < 0 else len(other), _one_version(shown))
    version = source.pop(-1 if step < 0 else 0)
    return _with_messages(conversation, [*messages[:-1], {**version, "earlier": earlier, "later": later}])


def cut_answer(conversation: Conversation) -> Message | None:
    """Return the last message if it is an answer that was cut and can be continued."""
    last = conversation["messages"][-1] if conversation["messages"] else {"role": "none"}
    return last if last["role"] == "assistant" and last.get("note") and last.get("token_ids") else None


def set_answer(conversation: Conversation, answer: Message) -> Conversation:
    """Add an answer to the last user message, or replace the answer it has, whose other versions stay."""
    messages = conversation["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        return _with_messages(conversation, [*messages, answer], conversation.get("removed"))
    versions = {name: messages[-1][name] for name in ("earlier", "later") if name in messages[-1]}
    return _with_messages(conversation, [*messages[:-1], answer | versions], conversation.get("removed"))


def prompt_messages(conversation: Conversation, system: str = "") -> list[dict[str, str]]:
    """Return role and content of the messages for the chat template, after the system prompt if there is one."""
    first = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return first + [
        {"role": message["role"], "content": message["content"]}
        for message in conversation["messages"]
        if message["content"] or message["role"] == "user"
    ]


def last_answer(conversation: Conversation) -> tuple[str, Message]:
    """Return the name of the last answer and the answer; two empty ones if there is none."""
    messages = conversation["messages"]
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return "", {}
    number = sum(message["role"] == "user" for message in messages[:last])
    return answer_name(number, messages[last]), messages[last]


def answer_name(number: int, answer: Message) -> str:
    """Return the name of the answer to a user message, counted from 1, and of its version if it has several."""
    version = len(answer.get("earlier", [])) + 1
    return f"answer {number}" if version == 1 and not answer.get("later") else f"answer {number}, version {version}"


def stored_form(conversation: Conversation) -> Conversation:
    """Return what the browser stores of a conversation."""
    return {name: value for name, value in conversation.items() if name != "removed"}


def parse_conversation(raw: Any) -> Conversation:
    """Return a conversation sent by a browser without its invalid parts, or a new one if it is none."""
    empty = new_conversation()
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        return empty
    messages = [message for each in raw["messages"] if (message := _parse_message(each)) is not None]
    name, settings = raw.get("id"), raw.get("settings")
    return {
        "id": name[:40] if isinstance(name, str) and name.isalnum() else empty["id"],
        "title": _title(messages),
        "updated": raw["updated"] if isinstance(raw.get("updated"), (int, float)) else 0,
        "settings": dict(settings) if isinstance(settings, dict) else {},
        "messages": messages,
    }


def _parse_message(raw: Any, versions: bool = True) -> Message | None:
    if (
        not isinstance(raw, dict)
        or raw.get("role") not in ("user", "assistant")
        or not isinstance(raw.get("content"), str)
    ):
        return None
    message: Message = {"role": raw["role"], "content": raw["content"]}
    if raw["role"] == "user":
        return message
    lists = {name: raw[name] if isinstance(raw.get(name), list) else [] for name in LISTS}
    message["tokens"] = [[pair[0], pair[1]] for pair in lists["tokens"] if _is_pair(pair)]
    message["lengths"] = [length for length in lists["lengths"] if type(length) is int and length > 0]
    whole = all(type(token) is int and token >= 0 for token in lists["token_ids"])
    message["token_ids"] = list(lists["token_ids"]) if whole else []
    for name in ("dropped", "seed"):
        message[name] = raw[name] if type(raw.get(name)) is int else 0
    message["seconds"] = float(raw["seconds"]) if isinstance(raw.get("seconds"), (int, float)) else 0.0
    message["tree"] = raw["tree"] if isinstance(raw.get("tree"), dict) else None
    for name in ("summary", "note"):
        message[name] = raw[name][:200] if isinstance(raw.get(name), str) else ""
    if versions:
        for name in ("earlier", "later"):
            parsed = (_parse_message(each, versions=False) for each in lists[name])
            message[name] = [each for each in parsed if each is not None and each["role"] == "assistant"]
    return message


def _one_version(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in ("earlier", "later")}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def _with_messages(
    conversation: Conversation, messages: list[Message], removed: list[Message] | None = None
) -> Conversation:
    updated = int(time.time() * 1000)
    changed = {**conversation, "messages": messages, "title": _title(messages), "updated": updated, "removed": removed}
    return changed if removed else stored_form(changed)


def _title(messages: list[Message]) -> str:
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    line = " ".join(first.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def _last_user_message(messages: list[Message]) -> int | None:
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
