"""Requests of every open page, which are cancelled when the page is stopped or closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from medhead.serving.handle import RequestHandle

Kind = Literal["chat", "race"]


@dataclass
class Turn:
    """An answer that a page is generating."""

    conversation: str  # id
    abandoned: bool = False  # the user has left the conversation: nothing more of the answer may be shown
    stopped: bool = False  # a request that is submitted later is cancelled


class Sessions:
    """Request handles and turns by session. Thread-safe."""

    def __init__(self) -> None:
        self._handles: dict[tuple[str, Kind], list[RequestHandle]] = {}
        self._turns: dict[str, Turn] = {}
        self._lock = threading.Lock()

    def tracker(self, session: str, kind: Kind) -> Callable[[RequestHandle], None]:
        """Return a function that adds a handle to a session and removes those that are done."""

        def track(handle: RequestHandle) -> None:
            with self._lock:
                handles = [other for other in self._handles.get((session, kind), []) if not other.done]
                self._handles[session, kind] = [*handles, handle]
                turn = self._turns.get(session)
            if kind == "chat" and turn is not None and turn.stopped:
                handle.cancel()

        return track

    def cancel(self, session: str, kind: Kind | None = None) -> int:
        """Cancel a session's requests, of one kind or all, and that of its turn; return how many were running."""
        with self._lock:
            if kind != "race" and (turn := self._turns.get(session)) is not None:
                turn.stopped = True
            keys = [key for key in self._handles if key[0] == session and kind in (None, key[1])]
            handles = [handle for key in keys for handle in self._handles.pop(key) if not handle.done]
        for handle in handles:
            handle.cancel()
        return len(handles)

    def begin_turn(self, session: str, conversation: str) -> Turn | None:
        """Begin a turn; return None if the session has one already, or another session has one in this conversation."""
        with self._lock:
            if session in self._turns or self._is_answered(conversation):
                return None
            turn = self._turns[session] = Turn(conversation)
            return turn

    def end_turn(self, session: str) -> None:
        """End the session's turn."""
        with self._lock:
            self._turns.pop(session, None)

    def is_busy(self, session: str) -> bool:
        """Return whether a session has a turn."""
        with self._lock:
            return session in self._turns

    def is_answered(self, conversation: str) -> bool:
        """Return whether any session has a turn in a conversation."""
        with self._lock:
            return self._is_answered(conversation)

    def _is_answered(self, conversation: str) -> bool:
        return any(turn.conversation == conversation for turn in self._turns.values())

    async def abandon_turn(self, session: str, timeout: float = 5.0) -> None:
        """Cancel a session's answer, and wait until nothing more of it can be shown, at most `timeout` seconds."""
        with self._lock:
            if (turn := self._turns.get(session)) is not None:
                turn.abandoned = True
        deadline = time.perf_counter() + timeout
        while self.is_busy(session) and time.perf_counter() < deadline:
            self.cancel(session, "chat")  # repeatedly, because the request may not have been submitted yet
            await asyncio.sleep(0.01)
