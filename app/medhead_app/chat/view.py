"""A conversation as the page's chat component shows it: a plain value that `assets/chat.js` draws."""

from __future__ import annotations

from html import escape
from typing import Any

from medhead_app.chat.conversation import Conversation, Message
from medhead_app.chat.text import readable
from medhead_app.chat.token_colors import tinted


def view_of(
    conversation: Conversation, *, show_sources: bool, busy: bool = False, keep: bool = False
) -> dict[str, Any]:
    """The component's value.

    Args:
        conversation: what is shown.
        show_sources: tinted tokens instead of rendered markdown.
        busy: an answer is being written.
        keep: the browser is to store the conversation as it is now.
    """
    messages = conversation["messages"]
    return {
        "id": conversation["id"],
        "title": conversation["title"],
        "busy": busy,
        "messages": [
            message_view(message, show_sources, writing=busy and index == len(messages) - 1)
            for index, message in enumerate(messages)
        ],
        "keep": conversation if keep else None,
    }


def message_view(message: Message, show_sources: bool, writing: bool = False) -> dict[str, Any]:
    """One message: HTML to show, text to copy, and the small print."""
    if message["role"] == "user":
        return {"role": "user", "html": escape(message["content"]), "text": message["content"], "plain": True}
    tokens = message.get("tokens")
    show_tokens = bool(show_sources and tokens)
    return {
        "role": "assistant",
        "html": tinted(tokens) if show_tokens and tokens else readable(message["content"]),
        "text": message["content"],
        "plain": show_tokens,
        "above": _dropped(message.get("dropped", 0)),
        "facts": " · ".join(part for part in (message.get("facts", ""), message.get("note", "")) if part),
        "writing": writing,
    }


def _dropped(count: int) -> str:
    if not count:
        return ""
    messages = "1 older message was" if count == 1 else f"{count} older messages were"
    return f"The conversation is longer than the model's context: {messages} left out of this answer."
