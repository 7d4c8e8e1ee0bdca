"""Build the chat page: `build_page(service)` is a Gradio app, mounted with the arguments of `page_options()`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from medhead_app.chat.handlers import Handlers
from medhead_app.chat.layout import Components
from medhead_app.chat.theme import READ_CURRENT
from medhead_app.service import Service

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
MAX_EVENTS = 512  # waiting events of the page; the engine's queue limits the requests


def build_page(service: Service) -> gr.Blocks:
    """Return the page of a service."""
    with gr.Blocks(title=f"medhead · {service.name}", fill_width=True, analytics_enabled=False) as page:
        components = Components(service)
        handlers = Handlers(service, components)
        _connect_chat(page, components, handlers)
        _connect_race(components, handlers)
        page.unload(handlers.unload)
    page.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)
    return page


def _connect_chat(page: gr.Blocks, ui: Components, handlers: Handlers) -> None:
    view = [ui.conversation, ui.chat, ui.live, ui.send, ui.stop, ui.panel]
    answered, loaded = [*view, ui.message, ui.images], [*view, *ui.settings]
    state = [ui.conversation]
    send = [ui.message.submit, ui.send.click]
    gr.on(send, handlers.send, [*state, ui.message, ui.images, *ui.settings], answered, **QUIET)
    ui.chat.ask(handlers.ask, [*state, *ui.settings], answered, **QUIET)
    ui.chat.modify(handlers.modify, state, answered, **QUIET)
    ui.chat.sync(handlers.sync, None, view, trigger_mode="multiple", **QUIET)
    ui.stop.click(handlers.stop, None, None, queue=False, **QUIET)
    ui.clear.click(handlers.clear, state, view, **QUIET)
    ui.chats.new_chat(handlers.new_chat, None, view, **QUIET)
    ui.chats.open(handlers.open, None, loaded, **QUIET)
    page.load(handlers.load, [ui.stored], loaded, js=READ_CURRENT, **QUIET)


def _connect_race(ui: Components, handlers: Handlers) -> None:
    start = [ui.race_start.click, ui.race_prompt.submit]
    outputs = [ui.race_start, ui.race_stop, ui.race_plain, ui.race_speculative, ui.race_verdict, ui.race_panel]
    gr.on(start, handlers.race, [ui.race_prompt, *ui.settings], outputs, **QUIET)
    ui.race_stop.click(handlers.stop_race, None, None, queue=False, **QUIET)
