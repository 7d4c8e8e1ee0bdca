"""Event handlers of the page.

A handler returns a dictionary from components to values, as Gradio expects. Wrong input is shown in one line; an unexpected
error is logged with its traceback and shown without details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from medhead.errors import MedheadError
from medhead_app.chat.conversation import (
    Conversation,
    add_message,
    clear_messages,
    edit_message,
    new_conversation,
    parse_conversation,
    pass_lengths,
    remove_answer,
    undo_message,
)
from medhead_app.chat.generation import AUTOMATIC, PROPOSERS, TREE_SIZES, ChatSettings, Update, generate_answer
from medhead_app.chat.layout import SETTINGS, Components, lengths_panel, tree_panel
from medhead_app.chat.race import race
from medhead_app.chat.race_view import race_cards, verdict_line
from medhead_app.chat.sessions import Sessions
from medhead_app.chat.stats import live_line
from medhead_app.chat.view import conversation_view
from medhead_app.service import Service

LOG = logging.getLogger(__name__)
CHART_INTERVAL = 0.4  # seconds between two drawings of the charts during an answer
INTERNAL_ERROR = "Internal error; see the server's log."
Changes = dict[Any, Any]
Change = Callable[[Conversation], Conversation]


class Handlers:
    """Event handlers of one page."""

    def __init__(self, service: Service, components: Components) -> None:
        self.service, self.components, self.sessions = service, components, Sessions()

    async def send(
        self, request: gr.Request, conversation: Conversation, show_sources: bool, text: str, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Add the message in the box and answer it."""
        async for changes in self._answer(
            request, lambda before: add_message(before, text), conversation, show_sources, settings, text
        ):
            yield changes

    async def ask(
        self, request: gr.Request, event: gr.EventData, conversation: Conversation, show_sources: bool, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Answer an example, an edited message, or the last message once more, as the event's `action` says."""
        actions: dict[str, Change] = {
            "example": lambda before: add_message(before, str(event.text)),
            "edit": lambda before: edit_message(before, int(event.index), str(event.text)),
            "retry": remove_answer,
        }
        async for changes in self._answer(request, actions[event.action], conversation, show_sources, settings):
            yield changes

    def undo(self, conversation: Conversation, show_sources: bool) -> Changes:
        """Remove the last message and its answer, and put the message back into the box."""
        conversation, text = undo_message(conversation)
        return {**self._show(conversation, show_sources, store=True), self.components.message: text}

    async def clear(self, request: gr.Request, conversation: Conversation, show_sources: bool) -> Changes:
        """Remove all messages."""
        await self.sessions.abandon_turn(_session(request))
        return self._show(clear_messages(conversation), show_sources, store=True)

    async def new_chat(self, request: gr.Request, show_sources: bool) -> Changes:
        """Show a new conversation."""
        await self.sessions.abandon_turn(_session(request))
        return self._show(new_conversation(), show_sources)

    async def open(self, request: gr.Request, event: gr.EventData, show_sources: bool) -> Changes:
        """Show another conversation of this browser."""
        await self.sessions.abandon_turn(_session(request))
        return self.load(event.conversation, show_sources)

    def load(self, raw: Any, show_sources: bool) -> Changes:
        """Show a conversation that the browser stored, or a new one."""
        conversation = parse_conversation(raw)
        return self._show(conversation, show_sources) | self._stored_settings(conversation)

    def show(self, request: gr.Request, conversation: Conversation, show_sources: bool) -> Changes:
        """Switch between colored tokens and Markdown."""
        if self.sessions.is_busy(_session(request)):
            return {}
        return {self.components.chat: conversation_view(conversation, show_sources=show_sources)}

    def stop(self, request: gr.Request) -> None:
        """Stop the answer and keep its text."""
        self.sessions.cancel(_session(request), "chat")

    def unload(self, request: gr.Request) -> None:
        """Cancel all requests of a closed page."""
        self.sessions.cancel(_session(request))

    async def race(self, request: gr.Request, prompt: str, *settings: Any) -> AsyncIterator[Changes]:
        """Answer a prompt with plain and with speculative decoding."""
        ui = self.components
        ended = {ui.race_start: gr.update(visible=True), ui.race_stop: gr.update(visible=False)}
        try:
            chosen = self._settings(settings)
            plain, speculative = race_cards(None)
            yield {
                ui.race_start: gr.update(visible=False),
                ui.race_stop: gr.update(visible=True),
                ui.race_plain: plain,
                ui.race_speculative: speculative,
                ui.race_verdict: verdict_line(None),
            }
            on_submit = self.sessions.tracker(_session(request), "race")
            async with aclosing(race(self.service, prompt, chosen, on_submit)) as states:
                async for state in states:
                    plain, speculative = race_cards(state, chosen.max_new_tokens)
                    changes = {ui.race_plain: plain, ui.race_speculative: speculative}
                    yield changes | {ui.race_verdict: verdict_line(state)} | (ended if state.done else {})
        except Exception as error:
            yield {**ended, ui.race_verdict: verdict_line(None, _error_line(error))}

    def stop_race(self, request: gr.Request) -> None:
        """Stop both requests and keep their texts."""
        self.sessions.cancel(_session(request), "race")

    async def _answer(
        self,
        request: gr.Request,
        change: Change,
        before: Conversation,
        show_sources: bool,
        settings: tuple[Any, ...],
        text: str | None = None,
    ) -> AsyncIterator[Changes]:
        """Change the conversation and answer its last message; `text` is the content of the message box."""
        ui, session, conversation, answering = self.components, _session(request), before, False
        turn = self.sessions.begin_turn(session)
        if turn is None:
            _warn("An answer is still being generated: stop it first.")
            return
        try:
            chosen = self._settings(settings)
            conversation = change(before)
            box = {} if text is None else {ui.message: ""}
            yield self._show(conversation, show_sources, busy=True, store=True) | box
            on_submit = self.sessions.tracker(session, "chat")
            async with aclosing(generate_answer(self.service, conversation, chosen, on_submit)) as updates:
                last_charts = 0.0
                async for update in updates:
                    answering = True
                    if turn.abandoned:
                        return
                    conversation = update.conversation
                    charts = update.done or time.perf_counter() - last_charts >= CHART_INTERVAL
                    last_charts = time.perf_counter() if charts else last_charts
                    if update.error:
                        _warn(update.error)
                    yield self._progress(update, show_sources, charts)
        except Exception as error:
            line = _error_line(error)
            if not turn.abandoned:
                _warn(line)
                box = {}
                if not answering:  # the request was refused: restore the conversation and the message box
                    conversation, box = before, {ui.message: text} if text else {}
                failed = {ui.live: live_line(None, line, failed=True)}
                yield self._show(conversation, show_sources, store=True) | box | failed
        finally:
            self.sessions.end_turn(session)

    def _progress(self, update: Update, show_sources: bool, charts: bool) -> Changes:
        ui, conversation = self.components, update.conversation
        live = live_line(update.result, update.error or update.status, failed=bool(update.error))
        if update.done:
            return self._show(conversation, show_sources, store=True) | {ui.live: live}
        view = conversation_view(conversation, show_sources=show_sources, busy=True, store=charts)
        changes = {ui.conversation: conversation, ui.chat: view, ui.live: live}
        return changes | (self._charts(conversation) if charts else {})

    def _show(self, conversation: Conversation, show_sources: bool, busy: bool = False, store: bool = False) -> Changes:
        ui = self.components
        return {
            ui.conversation: conversation,
            ui.chat: conversation_view(conversation, show_sources=show_sources, busy=busy, store=store),
            ui.live: live_line(None),
            ui.send: gr.update(visible=not busy),
            ui.stop: gr.update(visible=busy),
            **self._charts(conversation),
        }

    def _charts(self, conversation: Conversation) -> Changes:
        lengths = lengths_panel(pass_lengths(conversation))
        return {self.components.tree: tree_panel(conversation.get("tree")), self.components.lengths: lengths}

    def _settings(self, values: tuple[Any, ...]) -> ChatSettings:
        return ChatSettings.from_fields(dict(zip(SETTINGS, values, strict=True)), self.service.max_new_tokens)

    def _stored_settings(self, conversation: Conversation) -> Changes:
        """Return the settings of the conversation's last answer."""
        ui = self.components
        if not conversation["settings"]:
            return {}
        try:
            stored = ChatSettings.from_fields(conversation["settings"], self.service.max_new_tokens)
        except MedheadError:
            return {}
        values = asdict(stored)
        values["seed"] = "" if stored.seed is None else str(stored.seed)
        if stored.proposer not in PROPOSERS or (stored.proposer == "heads" and not self.service.engine.has_heads):
            values["proposer"] = AUTOMATIC
        if stored.tree_size not in TREE_SIZES:
            values["tree_size"] = AUTOMATIC
        return {getattr(ui, name): values[name] for name in SETTINGS}


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _warn(line: str) -> None:
    gr.Warning(escape(line), duration=6)  # Gradio shows it as HTML


def _error_line(error: Exception) -> str:
    """Return one line for the user; log the traceback of an unexpected error."""
    if isinstance(error, MedheadError):
        return " ".join(str(error).split())
    LOG.error("the page failed", exc_info=error)
    return INTERNAL_ERROR
