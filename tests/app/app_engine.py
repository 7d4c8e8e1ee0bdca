"""A stand-in for the engine that emits given texts at a given pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import QueueFullError, Request, Result, StepOutput, Stopped
from medhead.serving.statistics import EngineStatistics

CONTEXT = 64


class FakeEngine:
    """The interface of `Engine`, with a thread for every request.

    Args:
        outputs: texts that every request gets, two tokens each.
        pause: seconds before each output.
        error: error that every request ends with.
        room: largest number of concurrent requests; there is no queue.
        raises: unexpected exception of `submit`.
    """

    def __init__(
        self,
        outputs: tuple[str, ...] = ("Hel", "lo ", "you"),
        pause: float = 0.0,
        error: str | None = None,
        room: int = 100,
        raises: Exception | None = None,
    ) -> None:
        self.outputs, self.pause, self.error, self.room, self.raises = outputs, pause, error, room, raises
        model = SimpleNamespace(generation_config=GenerationConfig())
        self.decoder = SimpleNamespace(target=SimpleNamespace(context=CONTEXT, model=model))
        self.listeners: list[Callable[[Request, Result], None]] = []
        self.handles: list[RequestHandle] = []
        self.max_rows, self.max_queue = room, 0
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
        if sum(not handle.done for handle in self.handles) >= self.room:
            raise QueueFullError("too many requests wait already; try again later")
        self.handles.append(handle := RequestHandle(request))
        threading.Thread(target=self._serve, args=(handle,), daemon=True).start()
        return handle

    def statistics(self) -> EngineStatistics:
        self.totals.running = sum(not handle.done for handle in self.handles)
        return self.totals

    def close(self) -> None:
        self.running = False
        while not all(handle.done for handle in self.handles):
            time.sleep(0.01)

    def _serve(self, handle: RequestHandle) -> None:
        start, result = time.perf_counter(), handle.result
        result.seed, result.proposer = handle.request.params.seed or 0, handle.request.proposer or "fake"
        for text in self.outputs:
            deadline = time.perf_counter() + self.pause
            while time.perf_counter() < deadline and not self._stopped(handle):
                time.sleep(0.01)
            if self._stopped(handle):
                return self._end(handle, start, "cancelled")
            result.first_token = result.first_token or time.perf_counter() - start
            result.passes, result.new_tokens = result.passes + 1, result.new_tokens + 2
            self.totals.passes, self.totals.new_tokens = self.totals.passes + 1, self.totals.new_tokens + 2
            result.lengths.append(2)
            handle.put(StepOutput([5, 6], text))
        return self._end(handle, start, "error" if self.error else "stop")

    def _stopped(self, handle: RequestHandle) -> bool:
        return handle.cancelled or not self.running

    def _end(self, handle: RequestHandle, start: float, reason: Any) -> None:
        handle.result.reason, handle.result.seconds = reason, time.perf_counter() - start
        for listener in self.listeners:
            listener(handle.request, handle.result)
        handle.end(self.error)
