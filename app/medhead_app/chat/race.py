"""Answer one prompt with and without speculation, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Result
from medhead_app.chat.generation import UPDATE_INTERVAL, ChatSettings, OnSubmit, StreamState, draw_seed
from medhead_app.service import Service


@dataclass
class RaceRun:
    """One of the two requests, and its output so far."""

    handle: RequestHandle
    stream: StreamState = field(default_factory=StreamState)

    @property
    def result(self) -> Result:
        """Return the result of the request so far."""
        return self.handle.result

    @property
    def done(self) -> bool:
        """Return whether the text is complete."""
        return self.handle.done and self.result.reason in ("stop", "length")

    async def read(self) -> None:
        """Read the output to its end."""
        async for output in self.handle.stream():
            self.stream.add(output)


@dataclass(frozen=True)
class RaceState:
    """The state of a race; it is done when both requests have ended."""

    plain: RaceRun
    speculative: RaceRun
    done: bool = False

    @property
    def speedup(self) -> float | None:
        """Return the service time of plain decoding by that of speculative decoding; None unless both are complete."""
        complete = self.done and self.plain.done and self.speculative.done
        if not complete or self.speculative.result.busy <= 0:
            return None
        return self.plain.result.busy / self.speculative.result.busy

    @property
    def identical(self) -> bool | None:
        """Return whether both gave the same tokens; None unless both are complete."""
        return None if self.speedup is None else self.plain.stream.token_ids == self.speculative.stream.token_ids


async def race(
    service: Service,
    prompt: str,
    settings: ChatSettings,
    on_submit: OnSubmit = lambda handle: None,
    interval: float = 2 * UPDATE_INTERVAL,
) -> AsyncGenerator[RaceState, None]:
    """Answer a prompt with plain and with speculative decoding; yield the state every `interval` seconds and at ends.

    Both requests have the same settings and seed. The engine alternates between them, so each is measured by its service
    time and not by the clock. Closing the generator cancels both.
    """
    if not prompt.strip():
        raise MedheadError("the prompt is empty: write something first")
    if settings.proposer == "none":
        raise MedheadError("the proposer 'none' is plain decoding itself: choose another proposer")
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    messages = [*system, {"role": "user", "content": prompt.strip()}]
    token_ids = (await run_in_threadpool(service.encode_chat, messages, settings.max_new_tokens)).token_ids
    seed = draw_seed() if settings.seed is None else settings.seed
    runs: list[RaceRun] = []
    reading: set[asyncio.Task[None]] = set()
    try:
        for changes in ({"proposer": "none", "tree_size": None}, {}):
            handle = service.engine.submit(settings.request(service, token_ids, seed=seed, **changes))
            on_submit(handle)
            runs.append(RaceRun(handle))
        reading = {asyncio.create_task(run.read()) for run in runs}
        while reading:
            ended, reading = await asyncio.wait(reading, timeout=interval, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()  # raises the task's exception
            yield RaceState(runs[0], runs[1], done=not reading)
    finally:
        for task in reading:
            task.cancel()
        for run in runs:
            run.handle.cancel()
