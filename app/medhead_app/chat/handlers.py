"""Event handlers of the page.

A handler returns a dictionary from components to values, as Gradio expects. Wrong input is shown in one line; an unexpected
error is logged with its traceback and shown without details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr

from medhead.errors import MedheadError
from medhead_app.chat import conversation as conversations
from medhead_app.chat.conversation import Conversation
from medhead_app.chat.generation import AUTOMATIC, PROPOSERS, TREE_SIZES, ChatSettings, Update, generate_answer
from medhead_app.chat.layout import SETTINGS, Components, draw_panel
from medhead_app.chat.race import RaceState, race
from medhead_app.chat.race_view import race_cards, verdict_line
from medhead_app.chat.sessions import Sessions
from medhead_app.chat.stats import answer_result, failed_line, live_line
from medhead_app.chat.view import conversation_view
from medhead_app.service import Service

LOG = logging.getLogger(__name__)
PANEL_INTERVAL = 0.4  # seconds between two drawings of the panel during an answer
ANSWERED = "This conversation is being answered, here or in another tab: wait, or stop it there."
INTERNAL_ERROR = "Internal error; see the server's log."
Changes = dict[Any, Any]
Change = Callable[[Conversation], Conversation]


class Handlers:
    """Event handlers of one page."""

    def __init__(self, service: Service, components: Components) -> None:
        self.service, self.components, self.sessions = service, components, Sessions()
        # Gradio empties all outputs of a handler that returns none
        self._unchanged: Changes = {components.chat: gr.skip()}

    async def send(
        self, request: gr.Request, conversation: Conversation, text: str, images: list[str] | None, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Add the message in the box and its images, and answer it."""
        async for changes in self._answer(
            request,
            lambda before: conversations.add_message(before, text, images or []),
            conversation,
            settings,
            text,
            images=images or [],
            from_box=True,
        ):
            yield changes

    async def ask(
        self, request: gr.Request, event: gr.EventData, conversation: Conversation, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Answer an example, an edited message, the last message once more, or continue, as the event's `action` says."""
        actions: dict[str, Change] = {
            "example": lambda before: conversations.add_message(before, str(event.text)),
            "edit": lambda before: conversations.edit_message(before, int(event.index), str(event.text)),
            "retry": conversations.new_version,
            "continue": lambda before: before,
        }
        change, go_on = actions[event.action], event.action == "continue"
        text = str(event.text) if event.action in ("example", "edit") else ""
        async for changes in self._answer(request, change, conversation, settings, text, go_on=go_on):
            yield changes

    def modify(self, event: gr.EventData, conversation: Conversation) -> Changes:
        """Change a conversation without an answer, as the event's `action` says.

        `undo` removes the last message and its answer, and puts the message and its images back into the box; `restore` undoes a
        removal; `version` shows another version of the last answer.
        """
        if self.sessions.is_answered(conversation["id"]):
            _warn(ANSWERED)
            return self._unchanged
        box: Changes = {}
        if event.action == "undo":
            box[self.components.images] = conversations.last_images(conversation)
            conversation, box[self.components.message] = conversations.undo_message(conversation)
        elif event.action == "restore":
            conversation = conversations.restore_messages(conversation)
        else:
            conversation = conversations.show_version(conversation, event.step)
        return self._show(conversation, store=True) | box

    def sync(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Show the conversation as another tab of the browser has stored it."""
        if self.sessions.is_busy(_session(request)):
            return self._unchanged
        return self._show(conversations.parse_conversation(event.conversation))

    async def clear(self, request: gr.Request, conversation: Conversation) -> Changes:
        """Remove all messages."""
        await self.sessions.abandon_turn(_session(request))
        if self.sessions.is_answered(conversation["id"]):
            _warn(ANSWERED)
            return self._unchanged
        return self._show(conversations.clear_messages(conversation), store=True)

    async def new_chat(self, request: gr.Request) -> Changes:
        """Show a new conversation."""
        await self.sessions.abandon_turn(_session(request))
        return self._show(conversations.new_conversation())

    async def open(self, request: gr.Request, event: gr.EventData) -> Changes:
        """Show another conversation of this browser."""
        await self.sessions.abandon_turn(_session(request))
        return self.load(event.conversation)

    def load(self, raw: Any) -> Changes:
        """Show a conversation that the browser stored, or a new one."""
        conversation = conversations.parse_conversation(raw)
        return self._show(conversation) | self._stored_settings(conversation)

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

        def show(state: RaceState | None, max_new_tokens: int = 1) -> Changes:
            plain, speculative = race_cards(state, max_new_tokens)
            return {ui.race_plain: plain, ui.race_speculative: speculative, ui.race_verdict: verdict_line(state)}

        def show_panel(state: RaceState) -> Changes:
            run = state.speculative
            tree = run.stream.tree(self.service.tokenizer)
            return {ui.race_panel: draw_panel("race, speculative decoding", tree, list(run.result.lengths))}

        try:
            chosen = self._settings(settings)
            yield {ui.race_start: gr.update(visible=False), ui.race_stop: gr.update(visible=True)} | show(None)
            on_submit = self.sessions.tracker(_session(request), "race")
            last_panel = 0.0
            async with aclosing(race(self.service, prompt, chosen, on_submit)) as states:
                async for state in states:
                    changes = show(state, chosen.max_new_tokens) | (ended if state.done else {})
                    if state.done or time.perf_counter() - last_panel >= PANEL_INTERVAL:
                        last_panel, changes = time.perf_counter(), changes | show_panel(state)
                    yield changes
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
        settings: tuple[Any, ...],
        text: str = "",
        images: Sequence[str] = (),
        from_box: bool = False,
        go_on: bool = False,
    ) -> AsyncIterator[Changes]:
        """Change the conversation and answer its last message, or go on with its last answer.

        `text` and `images` come into the message box if the request is refused; `from_box` says that they came from there.
        """
        ui, session, conversation, answering = self.components, _session(request), before, False
        turn = self.sessions.begin_turn(session, before["id"])
        if turn is None:
            _warn(ANSWERED)
            yield self._unchanged
            return
        try:
            chosen = self._settings(settings)
            conversation = change(before)
            box: Changes = {ui.message: "", ui.images: []} if from_box else {}
            yield self._show(conversation, busy=True, store=True) | box
            on_submit = self.sessions.tracker(session, "chat")
            updates = generate_answer(self.service, conversation, chosen, on_submit, go_on=go_on)
            last_panel = 0.0
            async with aclosing(updates):
                async for update in updates:
                    answering = True
                    if turn.abandoned:
                        return
                    conversation = update.conversation
                    panel = update.done or time.perf_counter() - last_panel >= PANEL_INTERVAL
                    last_panel = time.perf_counter() if panel else last_panel
                    if update.error:
                        _warn(update.error)
                    yield self._progress(update, panel)
        except Exception as error:
            line = _error_line(error)
            if not turn.abandoned:
                _warn(line)
                box = {}
                if not answering:  # the request was refused: restore the conversation and the message box
                    conversation, box = before, self._boxes(text, images)
                failed = {ui.live: failed_line(line)}
                yield self._show(conversation, store=True) | box | failed
        finally:
            self.sessions.end_turn(session)

    def _boxes(self, text: str, images: Sequence[str]) -> Changes:
        """Return the changes that put a message that was refused back into the box."""
        ui = self.components
        return ({ui.message: text} if text else {}) | ({ui.images: list(images)} if images else {})

    def _progress(self, update: Update, panel: bool) -> Changes:
        """Return the changes of an update; with `panel` the panel is drawn and the browser stores the conversation."""
        ui, conversation = self.components, update.conversation
        name, answer = conversations.last_answer(conversation)
        line = failed_line(update.error) if update.error else live_line(answer_result(answer), name, update.status)
        live = {ui.live: line}
        if update.done:
            return self._show(conversation, store=True) | live
        store = panel and not conversations.has_images(conversation)  # which would be sent again and again
        view = conversation_view(conversation, busy=True, store=store)
        changes = {ui.conversation: conversation, ui.chat: view} | live
        return changes | (self._panel(conversation) if panel else {})

    def _show(self, conversation: Conversation, busy: bool = False, store: bool = False) -> Changes:
        ui = self.components
        name, answer = conversations.last_answer(conversation)
        return {
            ui.conversation: conversation,
            ui.chat: conversation_view(conversation, busy=busy, store=store),
            ui.live: live_line(answer_result(answer), name, answer.get("note", "")),
            ui.send: gr.update(visible=not busy),
            ui.stop: gr.update(visible=busy),
            **self._panel(conversation),
        }

    def _panel(self, conversation: Conversation) -> Changes:
        name, answer = conversations.last_answer(conversation)
        return {self.components.panel: draw_panel(name, answer.get("tree"), answer.get("lengths", []))}

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
