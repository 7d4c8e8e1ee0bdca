"""The chat page: `build_page(service)` is a gradio app, to be mounted with the look of `look()`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from medhead_app.chat.handlers import Handlers
from medhead_app.chat.layout import Parts, lay_out
from medhead_app.chat.theme import READ_CURRENT
from medhead_app.service import Service

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUEUE = 512  # events that may wait; the engine's own queue is what bounds the requests


def build_page(service: Service) -> gr.Blocks:
    """The page of a service.

    Example:
        >>> gr.mount_gradio_app(app, build_page(service), "/", **look())
    """
    with gr.Blocks(title=f"medhead · {service.name}", fill_width=True, analytics_enabled=False) as page:
        parts = lay_out(service)
        handlers = Handlers(service, parts)
        _wire_chat(page, parts, handlers)
        _wire_race(parts, handlers)
        page.unload(handlers.leave)
    page.queue(default_concurrency_limit=None, max_size=QUEUE, api_open=False)
    return page


def _wire_chat(page: gr.Blocks, parts: Parts, handlers: Handlers) -> None:
    view = [parts.conversation, parts.chat, parts.live, parts.send, parts.stop, parts.tree, parts.lengths]
    turn_outputs = [*view, parts.message]
    state = [parts.conversation, parts.show_sources]
    asks = [*state, *parts.settings]

    sends = [parts.message.submit, parts.send.click]
    gr.on(sends, handlers.send, [*state, parts.message, *parts.settings], turn_outputs, **QUIET)
    parts.chat.example(handlers.example, asks, turn_outputs, **QUIET)
    parts.chat.edit(handlers.edit, asks, turn_outputs, **QUIET)
    parts.chat.retry(handlers.retry, asks, turn_outputs, **QUIET)
    parts.chat.undo(handlers.undo, state, turn_outputs, **QUIET)
    parts.stop.click(handlers.stop, None, None, queue=False, **QUIET)
    opened = [*view, *parts.settings]
    parts.clear.click(handlers.clear, state, view, **QUIET)
    parts.chats.fresh(handlers.fresh, [parts.show_sources], view, **QUIET)
    parts.chats.open(handlers.open, [parts.show_sources], opened, **QUIET)
    parts.show_sources.change(handlers.show, state, [parts.chat], **QUIET)
    page.load(handlers.load, [parts.stored, parts.show_sources], opened, js=READ_CURRENT, **QUIET)


def _wire_race(parts: Parts, handlers: Handlers) -> None:
    outputs = [parts.race_start, parts.race_stop, parts.race_plain, parts.race_guessing, parts.race_verdict]
    gr.on(
        [parts.race_start.click, parts.race_prompt.submit],
        handlers.race,
        [parts.race_prompt, *parts.settings],
        outputs,
        **QUIET,
    )
    parts.race_stop.click(handlers.stop_race, None, None, queue=False, **QUIET)
