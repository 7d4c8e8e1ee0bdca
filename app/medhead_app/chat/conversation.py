"""Conversations and the operations on them; no function changes its arguments.

A conversation is plain JSON, because the browser stores it:
`{"id", "title", "updated", "settings", "messages": [message, ...]}`, and `removed`, the messages before the last removal,
which are not stored. Every message has `role` and `content`. A message of the user with images has `images` (data URLs) or
`lost` (how many the browser did not keep). An answer also has

- `tokens` (pairs of text and source), `token_ids`, `lengths` (number of tokens of every pass), `seconds` (of decoding), `seed`;
- `tree` (the last one with draft tokens), `summary` (one line of statistics), `dropped` (number of older messages that did
  not fit the context) and `note` (how it ended, if not by itself);
- `earlier` and `later`: its other versions in the order in which they were generated.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from medhead.errors import MedheadError
from medhead_app.images import read_data_url

Conversation = dict[str, Any]
Message = dict[str, Any]
TITLE_LENGTH = 48
MAX_CHARACTERS = 400_000  # of one message
MAX_MESSAGE_IMAGES = 4
MAX_IMAGE_CHARACTERS = 2**20  # of the data URL of one image
KEPT_IMAGE_CHARACTERS = 2 * 2**20  # of the images of one conversation that the browser keeps
LISTS = ("tokens", "token_ids", "lengths", "earlier", "later")  # of an answer


def new_conversation() -> Conversation:
    """Return an empty conversation with a new id."""
    return {"id": uuid.uuid4().hex[:12], "title": "", "updated": 0, "settings": {}, "messages": []}


def add_message(conversation: Conversation, text: str, images: Sequence[str] = ()) -> Conversation:
    """Add a user message with images, which are data URLs."""
    if not text.strip() and not images:
        raise MedheadError("the message is empty: write something first")
    if len(text) > MAX_CHARACTERS:
        raise MedheadError(f"the message has {len(text)} characters, at most {MAX_CHARACTERS} are allowed: shorten it")
    _check_images(images)
    message = {"role": "user", "content": text.strip()} | ({"images": list(images)} if images else {})
    return _with_messages(conversation, [*conversation["messages"], message])


def edit_message(conversation: Conversation, index: int, text: str) -> Conversation:
    """Replace the text of the user message at `index`, whose images stay, and remove the messages after it."""
    messages = conversation["messages"]
    if not 0 <= index < len(messages) or messages[index]["role"] != "user":
        raise MedheadError("only your own messages can be edited")
    images = messages[index].get("images", [])
    edited = add_message({**conversation, "messages": messages[:index]}, text, images)
    if "lost" in messages[index]:
        edited["messages"][-1]["lost"] = messages[index]["lost"]
    return {**edited, "removed": messages}


def undo_message(conversation: Conversation) -> tuple[Conversation, str]:
    """Remove the last user message and its answer; also return the text of that message, '' if there is none."""
    messages = conversation["messages"]
    last = _last_user_message(messages)
    if last is None:
        return conversation, ""
    return _with_messages(conversation, messages[:last], removed=messages), messages[last]["content"]


def last_images(conversation: Conversation) -> list[str]:
    """Return the images of the last user message."""
    last = _last_user_message(conversation["messages"])
    return [] if last is None else list(conversation["messages"][last].get("images", []))


def has_images(conversation: Conversation) -> bool:
    """Return whether any message has images."""
    return any(message.get("images") for message in conversation["messages"])


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


def prompt_messages(conversation: Conversation, system: str = "") -> list[dict[str, Any]]:
    """Return role and content of the messages for the chat template, after the system prompt if there is one."""
    first: list[dict[str, Any]] = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return first + [
        {"role": message["role"], "content": _content(message)}
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
    """Return what the browser stores of a conversation; of its images the newest that fit `KEPT_IMAGE_CHARACTERS`."""
    room, messages = KEPT_IMAGE_CHARACTERS, list[Message]()
    for message in reversed(conversation["messages"]):
        images = message.get("images", [])
        room -= sum(map(len, images))
        if images and room < 0:
            message = _without(message, "images") | {"lost": message.get("lost", 0) + len(images)}
        messages.insert(0, message)
    return _without(conversation, "removed") | {"messages": messages}


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
        images = raw["images"] if isinstance(raw.get("images"), list) else []
        if found := [url for url in images[:MAX_MESSAGE_IMAGES] if isinstance(url, str) and _is_image(url)]:
            message["images"] = found
        if type(raw.get("lost")) is int and raw["lost"] > 0:
            message["lost"] = raw["lost"]
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
    return _without(message, "earlier", "later")


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _content(message: Message) -> Any:
    """Return the content of a message for the chat template: a text, or images and a text."""
    images = [read_data_url(url) for url in message.get("images", [])]
    text = [message["content"]] if message["content"] else []
    return [*images, *text] if images else message["content"]


def _check_images(images: Sequence[str]) -> None:
    if len(images) > MAX_MESSAGE_IMAGES:
        raise MedheadError(f"a message may have {MAX_MESSAGE_IMAGES} images, got {len(images)}: remove some")
    for url in images:
        if not isinstance(url, str) or len(url) > MAX_IMAGE_CHARACTERS:
            raise MedheadError(f"an image may have {MAX_IMAGE_CHARACTERS:,} characters as a data URL: scale it down")
        read_data_url(url)


def _is_image(url: str) -> bool:
    try:
        _check_images([url])
    except MedheadError:
        return False
    return True


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def _with_messages(
    conversation: Conversation, messages: list[Message], removed: list[Message] | None = None
) -> Conversation:
    updated = int(time.time() * 1000)
    changed = {**conversation, "messages": messages, "title": _title(messages), "updated": updated, "removed": removed}
    return changed if removed else _without(changed, "removed")


def _title(messages: list[Message]) -> str:
    first = next((message["content"] or "Image" for message in messages if message["role"] == "user"), "")
    line = " ".join(first.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def _last_user_message(messages: list[Message]) -> int | None:
    return max((index for index, message in enumerate(messages) if message["role"] == "user"), default=None)
