"""An engine that decodes nothing: it says what it is told to, as slowly as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from medhead.errors import MedheadError
from medhead.serving.engine import EngineStatistics
from medhead.serving.handle import RequestHandle
from medhead.serving.request import QueueFullError, Request, Result, StepOutput, Stopped

CONTEXT = 64


class FakeEngine:
    """The engine's interface, with a thread for every request.

    Args:
        pieces: texts that every request gets, two tokens each.
        pause: seconds before each.
        error: how every request ends, instead of well.
        room: requests at a time; the queue holds none.
        raises: what `submit` raises that no one has thought of.
    """

    def __init__(
        self,
        pieces: tuple[str, ...] = ("Hel", "lo ", "you"),
        pause: float = 0.0,
        error: str | None = None,
        room: int = 100,
        raises: Exception | None = None,
    ) -> None:
        self.pieces, self.pause, self.error, self.room, self.raises = pieces, pause, error, room, raises
        self.decoder = SimpleNamespace(target=SimpleNamespace(context=CONTEXT))
        self.listeners: list[Callable[[Request, Result], None]] = []
        self.tickets: list[RequestHandle] = []
        self.totals, self.running = EngineStatistics(), False

    def start(self) -> FakeEngine:
        self.running = True
        return self

    def submit(self, request: Request) -> RequestHandle:
        if self.raises is not None:
            raise self.raises
        if not self.running:
            raise Stopped("the engine is not running")
        if not request.prompt:
            raise MedheadError("the prompt is empty")
        if sum(not ticket.done for ticket in self.tickets) >= self.room:
            raise QueueFullError("too many requests wait already; try again later")
        self.tickets.append(ticket := RequestHandle(request))
        threading.Thread(target=self._serve, args=(ticket,), daemon=True).start()
        return ticket

    def statistics(self) -> EngineStatistics:
        self.totals.running = sum(not ticket.done for ticket in self.tickets)
        return self.totals

    def close(self) -> None:
        self.running = False
        while not all(ticket.done for ticket in self.tickets):
            time.sleep(0.01)

    def _serve(self, ticket: RequestHandle) -> None:
        began, result = time.perf_counter(), ticket.result
        result.seed, result.proposer = ticket.request.seed or 0, ticket.request.proposer or "fake"
        for text in self.pieces:
            deadline = time.perf_counter() + self.pause
            while time.perf_counter() < deadline and not self._gone(ticket):
                time.sleep(0.01)
            if self._gone(ticket):
                return self._end(ticket, began, "cancelled")
            result.first_token = result.first_token or time.perf_counter() - began
            result.passes, result.new_tokens = result.passes + 1, result.new_tokens + 2
            self.totals.passes, self.totals.new_tokens = self.totals.passes + 1, self.totals.new_tokens + 2
            result.lengths.append(2)
            ticket.put(StepOutput([5, 6], text))
        return self._end(ticket, began, "error" if self.error else "stop")

    def _gone(self, ticket: RequestHandle) -> bool:
        return ticket.cancelled or not self.running

    def _end(self, ticket: RequestHandle, began: float, reason: Any) -> None:
        ticket.result.reason, ticket.result.seconds = reason, time.perf_counter() - began
        for listener in self.listeners:
            listener(ticket.request, ticket.result)
        ticket.end(self.error)
