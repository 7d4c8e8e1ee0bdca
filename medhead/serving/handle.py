"""The handle of a submitted request: its outputs as they come, and its result."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from medhead.serving.request import EngineError, Request, Result, StepOutput

_END = object()


class RequestHandle:
    """Outputs of a request as they come, and its result at the end.

    Use one of `for output in handle`, `async for output in handle.stream()`, or `await handle.finish()` / `handle.wait()`
    for the whole text; every output is read once. The engine never waits for a slow reader.

    Attributes:
        request: what was asked for; without its model inputs from when its prompt is read.
        result: filled as the request goes on; final once `done`.
    """

    def __init__(self, request: Request, notify: Callable[[], None] = lambda: None) -> None:
        self.request, self.result = request, Result(prompt_tokens=len(request.prompt))
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done, self._cancelled = threading.Event(), threading.Event()
        self._error: str | None = None
        self._notify = notify
        self._wake: Callable[[], None] | None = None

    # ---------------------------------------------------------------- the caller's side

    def __iter__(self) -> Iterator[StepOutput]:
        """Yield outputs until the end.

        Raises:
            EngineError: the request failed.
        """
        while (item := self._queue.get()) is not _END:
            yield item
        self._over()

    async def stream(self) -> AsyncIterator[StepOutput]:
        """Yield outputs until the end, for asyncio. Leaving the loop early does not cancel: call `cancel`.

        Raises:
            EngineError: the request failed.
        """
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        while True:
            ready.clear()
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                await ready.wait()
                continue
            if item is _END:
                break
            yield item
        self._over()

    def wait(self) -> str:
        """Wait for the end and return the whole text.

        Raises:
            EngineError: the request failed.
        """
        return "".join(output.text for output in self)

    async def finish(self) -> str:
        """Return the whole text, for asyncio.

        Raises:
            EngineError: the request failed.
        """
        return "".join([output.text async for output in self.stream()])

    def cancel(self) -> None:
        """Give the request up; its place is free after the running step. May be called at any time from any thread."""
        self._cancelled.set()
        self._notify()

    @property
    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    # ---------------------------------------------------------------- the engine's side

    def put(self, output: StepOutput) -> None:
        """Hand on an output."""
        self._queue.put(output)
        self._awake()

    def end(self, error: str | None = None) -> None:
        """Tell the caller that there will be no more outputs."""
        self._error = error
        self._done.set()
        self._queue.put(_END)
        self._awake()

    def _awake(self) -> None:
        if (wake := self._wake) is not None:
            try:
                wake()
            except RuntimeError:  # the caller's event loop is closed
                self._wake = None

    def _over(self) -> None:
        """Leave the end in the queue for other readers, and raise the error if there was one."""
        self._queue.put(_END)
        if self._error is not None:
            raise EngineError(self._error)
