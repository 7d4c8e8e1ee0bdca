"""The value of the page's chat component, which `assets/chat.js` draws."""

from __future__ import annotations

from html import escape
from typing import Any

from medhead_app.chat.conversation import Conversation, Message
from medhead_app.chat.text import render_markdown


def conversation_view(
    conversation: Conversation, *, show_sources: bool, busy: bool = False, store: bool = False
) -> dict[str, Any]:
    """Return the component's value.

    With `show_sources` the words of answers are colored. `busy` means that the last message is being
    generated, and `store` lets the browser store the conversation.
    """
    last = len(conversation["messages"]) - 1
    return {
        "id": conversation["id"],
        "title": conversation["title"],
        "busy": busy,
        "messages": [
            message_view(message, show_sources, generating=busy and index == last)
            for index, message in enumerate(conversation["messages"])
        ],
        "store": conversation if store else None,
    }


def message_view(message: Message, show_sources: bool, generating: bool = False) -> dict[str, Any]:
    """Return one message: the HTML to show, the text to copy, the notice above and the summary below."""
    content = message["content"]
    if message["role"] == "user":
        return {"role": "user", "html": escape(content), "text": content, "plain": True}
    return {
        "role": "assistant",
        "html": render_markdown(content, message.get("tokens", []) if show_sources else []),
        "text": content,
        "plain": False,
        "notice": _dropped_notice(message.get("dropped", 0)),
        "summary": " · ".join(part for part in (message.get("summary", ""), message.get("note", "")) if part),
        "generating": generating,
    }


def _dropped_notice(count: int) -> str:
    if not count:
        return ""
    messages = "1 older message was" if count == 1 else f"{count} older messages were"
    return f"The conversation is longer than the model's context: {messages} left out of this answer."
