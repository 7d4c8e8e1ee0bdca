"""The value of the page's chat component, which `assets/chat.js` draws."""

from __future__ import annotations

from html import escape
from typing import Any

from medhead_app.chat.conversation import Conversation, Message, answer_name, cut_answer, stored_form
from medhead_app.chat.text import render_markdown


def conversation_view(conversation: Conversation, *, busy: bool = False, store: bool = False) -> dict[str, Any]:
    """Return the component's value.

    `busy` means that the last message is being generated, and `store` lets the browser store the conversation.
    """
    messages, views, number = conversation["messages"], [], 0
    for index, message in enumerate(messages):
        number += message["role"] == "user"  # a message and its answer have the same number
        views.append(message_view(message, number, generating=busy and index == len(messages) - 1))
    return {
        "id": conversation["id"],
        "title": conversation["title"],
        "updated": conversation["updated"],
        "busy": busy,
        "messages": views,
        "cut": not busy and cut_answer(conversation) is not None,
        "removed": bool(conversation.get("removed")),
        "store": stored_form(conversation) if store else None,
    }


def message_view(message: Message, number: int = 1, generating: bool = False) -> dict[str, Any]:
    """Return one message: the HTML to show, the text to copy, its name, the notice above, the summary below, its versions."""
    content = message["content"]
    if message["role"] == "user":
        name = f"message {number}"
        html = _images_html(message.get("images", []), name) + escape(content)
        return {
            "role": "user",
            "html": html,
            "text": content,
            "name": name,
            "summary": _lost_note(message.get("lost", 0)),
        }
    earlier, later = len(message.get("earlier", [])), len(message.get("later", []))
    name = answer_name(number, message)
    parts = (f"Answer {number}", message.get("summary", ""), message.get("note", ""))
    return {
        "role": "assistant",
        "html": render_markdown(content, message.get("tokens", [])),
        "text": content,
        "name": name,
        "notice": _dropped_notice(message.get("dropped", 0)),
        "summary": " · ".join(part for part in parts if part),
        "version": earlier + 1,
        "versions": earlier + 1 + later,
        "generating": generating,
    }


def _images_html(images: list[str], name: str) -> str:
    """Return the images of a message, which are data URLs."""
    shown = (f'<img src="{escape(url)}" alt="Image {number} of {name}">' for number, url in enumerate(images, start=1))
    return f'<div class="mh-images">{"".join(shown)}</div>' if images else ""


def _lost_note(count: int) -> str:
    if not count:
        return ""
    images = "1 image of this message was" if count == 1 else f"{count} images of this message were"
    return f"{images} not kept in this browser, and the model does not see them."


def _dropped_notice(count: int) -> str:
    if not count:
        return ""
    messages = "1 older message was" if count == 1 else f"{count} older messages were"
    return f"The conversation is longer than the model's context: {messages} left out of this answer."
