"""Which requests belong to which open page, so that they end when it is stopped or closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from medhead.serving.ticket import Ticket

Kind = Literal["chat", "race"]


class Sessions:
    """Tickets by session and kind. May be used from any thread."""

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], list[Ticket]] = {}
        self._lock = threading.Lock()

    def holder(self, session: str, kind: Kind) -> Callable[[Ticket], None]:
        """What remembers a ticket for a session; tickets that have ended are forgotten."""

        def hold(ticket: Ticket) -> None:
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

    def busy(self, session: str, kind: Kind) -> bool:
        """Whether a session has a request that has not ended."""
        with self._lock:
            return any(not ticket.done for ticket in self._tickets.get((session, kind), []))
