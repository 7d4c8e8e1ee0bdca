"""Which requests belong to which open page, so that they end when it is stopped or closed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Literal

from medhead.serving.handle import RequestHandle

Kind = Literal["chat", "race"]


class Turn:
    """An answer that a page waits for.

    Attributes:
        left: the person has gone on to something else; nothing more may be shown.
    """

    left = False


class Sessions:
    """Tickets and turns by session. May be used from any thread."""

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], list[RequestHandle]] = {}
        self._turns: dict[str, Turn] = {}
        self._lock = threading.Lock()

    def holder(self, session: str, kind: Kind) -> Callable[[RequestHandle], None]:
        """What remembers a ticket for a session; tickets that have ended are forgotten."""

        def hold(ticket: RequestHandle) -> None:
            with self._lock:
                tickets = [other for other in self._tickets.get((session, kind), []) if not other.done]
                self._tickets[session, kind] = [*tickets, ticket]

        return hold

    def cancel(self, session: str, kind: Kind | None = None) -> int:
        """Cancel a session's requests, of one kind or all; how many there were."""
        with self._lock:
            keys = [key for key in self._tickets if key[0] == session and kind in (None, key[1])]
            tickets = [ticket for key in keys for ticket in self._tickets.pop(key) if not ticket.done]
        for ticket in tickets:
            ticket.cancel()
        return len(tickets)

    def begin(self, session: str) -> Turn | None:
        """A turn of a session; None if one goes on already."""
        with self._lock:
            if session in self._turns:
                return None
            turn = self._turns[session] = Turn()
            return turn

    def finish(self, session: str) -> None:
        """The session's turn is over."""
        with self._lock:
            self._turns.pop(session, None)

    def busy(self, session: str) -> bool:
        """Whether a session waits for an answer."""
        with self._lock:
            return session in self._turns

    async def leave(self, session: str, patience: float = 5.0) -> None:
        """Give up a session's answer; returns once nothing more of it can reach the page, after `patience` seconds at most."""
        with self._lock:
            if (turn := self._turns.get(session)) is not None:
                turn.left = True
        end = time.perf_counter() + patience
        while self.busy(session) and time.perf_counter() < end:
            self.cancel(session, "chat")  # it may be about to get its ticket
            await asyncio.sleep(0.01)
