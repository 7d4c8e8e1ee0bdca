"""What happens on the page: from an event to new values of its parts.

Every handler gives a dict from parts to values, as gradio wants them. What a person did wrong comes back as one line; what
went wrong inside is logged with its trace, and said in one line too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from medhead.errors import MedheadError
from medhead_app.chat import conversation as talk
from medhead_app.chat.answer import AUTOMATIC, PROPOSERS, TREE_SIZES, Settings, Update, answer
from medhead_app.chat.conversation import Conversation
from medhead_app.chat.layout import SETTINGS, Parts, lengths_panel, tree_panel
from medhead_app.chat.numbers import live_line
from medhead_app.chat.race import race
from medhead_app.chat.race_view import cards, race_card, verdict_line
from medhead_app.chat.sessions import Sessions
from medhead_app.chat.view import view_of
from medhead_app.service import Service

LOG = logging.getLogger(__name__)
PICTURES_EVERY = 0.4  # seconds between two drawings of tree and distribution while an answer is written
INSIDE = "Something went wrong inside; the server's log says what."
Changes = dict[Any, Any]


class Handlers:
    """The page's events.

    Args:
        service: what answers.
        parts: of the page.
    """

    def __init__(self, service: Service, parts: Parts) -> None:
        self.service, self.parts, self.sessions = service, parts, Sessions()

    # ---------------------------------------------------------------- chat

    async def send(
        self, request: gr.Request, conversation: Conversation, show: bool, text: str, *settings: Any
    ) -> AsyncIterator[Changes]:
        """The person's message, and the answer."""
        turn = self._turn(request, lambda: talk.send(conversation, text), conversation, show, settings, text)
        async for changes in turn:
            yield changes

    async def example(
        self, request: gr.Request, event: gr.EventData, conversation: Conversation, show: bool, *settings: Any
    ) -> AsyncIterator[Changes]:
        """One of the examples, and the answer."""
        text = str(event.text)
        async for changes in self._turn(request, lambda: talk.send(conversation, text), conversation, show, settings):
            yield changes

    async def edit(
        self, request: gr.Request, event: gr.EventData, conversation: Conversation, show: bool, *settings: Any
    ) -> AsyncIterator[Changes]:
        """A message of the person's changed, and answered again."""
        index, text = int(event.index), str(event.text)
        async for changes in self._turn(
            request, lambda: talk.edit(conversation, index, text), conversation, show, settings
        ):
            yield changes

    async def retry(
        self, request: gr.Request, conversation: Conversation, show: bool, *settings: Any
    ) -> AsyncIterator[Changes]:
        """Another answer in place of the last one."""
        async for changes in self._turn(request, lambda: talk.regenerate(conversation), conversation, show, settings):
            yield changes

    def undo(self, conversation: Conversation, show: bool) -> Changes:
        """The last exchange taken back; its message is in the box again."""
        conversation, text = talk.undo(conversation)
        return {**self._shown(conversation, show, keep=True), self.parts.message: text}

    async def clear(self, request: gr.Request, conversation: Conversation, show: bool) -> Changes:
        """All messages gone."""
        await self.sessions.leave(_session(request))
        return self._shown(talk.cleared(conversation), show, keep=True)

    async def fresh(self, request: gr.Request, show: bool) -> Changes:
        """A new conversation."""
        await self.sessions.leave(_session(request))
        return self._shown(talk.new_conversation(), show)

    async def open(self, request: gr.Request, event: gr.EventData, show: bool) -> Changes:
        """Another conversation of this browser."""
        await self.sessions.leave(_session(request))
        return self.load(event.conversation, show)

    def load(self, raw: Any, show: bool) -> Changes:
        """A conversation as the browser kept it, or a new one."""
        conversation = talk.checked(raw)
        return self._shown(conversation, show) | self._settings_of(conversation)

    def show(self, request: gr.Request, conversation: Conversation, show: bool) -> Changes:
        """Tinted or readable."""
        busy = self.sessions.busy(_session(request))
        return {} if busy else {self.parts.chat: view_of(conversation, show_sources=show)}

    def stop(self, request: gr.Request) -> None:
        """The answer ends with what there is."""
        self.sessions.cancel(_session(request), "chat")

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.sessions.cancel(_session(request))

    # ---------------------------------------------------------------- race

    async def race(self, request: gr.Request, prompt: str, *settings: Any) -> AsyncIterator[Changes]:
        """Both answer."""
        parts = self.parts
        running = {parts.race_start: gr.update(visible=False), parts.race_stop: gr.update(visible=True)}
        ended = {parts.race_start: gr.update(visible=True), parts.race_stop: gr.update(visible=False)}
        try:
            chosen = self._settings(settings)
            hold = self.sessions.holder(_session(request), "race")
            yield {
                **running,
                parts.race_plain: race_card("Plain decoding", None),
                parts.race_guessing: race_card("Thinking ahead", None),
                parts.race_verdict: verdict_line(None),
            }
            async with aclosing(race(self.service, prompt, chosen, hold)) as standings:
                async for standing in standings:
                    plain, guessing = cards(standing, chosen.max_new_tokens)
                    changes = {
                        parts.race_plain: plain,
                        parts.race_guessing: guessing,
                        parts.race_verdict: verdict_line(standing),
                    }
                    yield changes | (ended if standing.done else {})
        except Exception as error:
            yield {**ended, parts.race_verdict: verdict_line(None, _line(error))}

    def stop_race(self, request: gr.Request) -> None:
        """Both end with what there is."""
        self.sessions.cancel(_session(request), "race")

    # ---------------------------------------------------------------- inside

    async def _turn(
        self,
        request: gr.Request,
        change: Any,
        before: Conversation,
        show: bool,
        settings: tuple[Any, ...],
        text: str | None = None,
    ) -> AsyncIterator[Changes]:
        """Change the conversation, then let the model answer it; `text` is what stands in the box."""
        session, now, answering = _session(request), before, False
        boxes: Changes = {} if text is None else {self.parts.message: ""}
        turn = self.sessions.begin(session)
        if turn is None:
            _warn("An answer is still being written: stop it first.")
            return
        try:
            chosen = self._settings(settings)
            now = change()
            yield self._shown(now, show, busy=True, keep=True) | boxes
            hold = self.sessions.holder(session, "chat")
            async with aclosing(answer(self.service, now, chosen, hold)) as updates:
                drawn = 0.0
                async for update in updates:
                    answering, boxes = True, {}
                    if turn.left:
                        return
                    now = update.conversation
                    pictures = update.done or time.perf_counter() - drawn >= PICTURES_EVERY
                    drawn = time.perf_counter() if pictures else drawn
                    if update.failed:
                        _warn(update.failed)
                    yield self._progress(update, show, pictures)
        except Exception as error:
            line = _line(error)
            if not turn.left:
                _warn(line)
                if not answering:  # it was refused: everything is as it was, the message in its box
                    now, boxes = before, {self.parts.message: text} if text else {}
                yield self._shown(now, show, keep=True) | boxes | {self.parts.live: live_line(None, line, failed=True)}
        finally:
            self.sessions.finish(session)

    def _progress(self, update: Update, show: bool, pictures: bool) -> Changes:
        parts, conversation = self.parts, update.conversation
        if update.done:
            state = update.failed or update.state
            line = live_line(update.result, state, failed=bool(update.failed))
            return self._shown(conversation, show, keep=True) | {parts.live: line}
        changes: Changes = {
            parts.conversation: conversation,
            parts.chat: view_of(conversation, show_sources=show, busy=True, keep=pictures),
            parts.live: live_line(update.result, update.state),
        }
        return changes | (self._pictures(conversation) if pictures else {})

    def _shown(self, conversation: Conversation, show: bool, busy: bool = False, keep: bool = False) -> Changes:
        parts = self.parts
        return {
            parts.conversation: conversation,
            parts.chat: view_of(conversation, show_sources=show, busy=busy, keep=keep),
            parts.live: live_line(None),
            parts.send: gr.update(visible=not busy),
            parts.stop: gr.update(visible=busy),
            **self._pictures(conversation),
        }

    def _pictures(self, conversation: Conversation) -> Changes:
        return {
            self.parts.tree: tree_panel(conversation.get("tree")),
            self.parts.lengths: lengths_panel(talk.accepted_lengths(conversation)),
        }

    def _settings(self, values: tuple[Any, ...]) -> Settings:
        return Settings.of(dict(zip(SETTINGS, values, strict=True)), self.service.max_new_tokens)

    def _settings_of(self, conversation: Conversation) -> Changes:
        """The fields as they were when the conversation was last answered."""
        raw = conversation["settings"]
        if not raw:
            return {}
        try:
            kept = Settings.of(raw, self.service.max_new_tokens)
        except MedheadError:
            return {}
        heads = self.service.engine.has_heads
        known = kept.proposer in PROPOSERS and (kept.proposer != "heads" or heads)
        changes: Changes = {getattr(self.parts, name): getattr(kept, name) for name in SETTINGS}
        changes[self.parts.seed] = "" if kept.seed is None else str(kept.seed)
        changes[self.parts.proposer] = kept.proposer if known else AUTOMATIC
        changes[self.parts.tree_size] = kept.tree_size if kept.tree_size in TREE_SIZES else AUTOMATIC
        return changes


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _warn(line: str) -> None:
    gr.Warning(escape(line), duration=6)  # gradio would read HTML in it


def _line(error: Exception) -> str:
    """One line for the person; what was not expected is logged with its trace."""
    if isinstance(error, MedheadError):
        return " ".join(str(error).split())
    LOG.error("the page failed", exc_info=error)
    return INSIDE
