"""Answer one prompt with and without speculation, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

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
    """Answer a prompt with plain and with speculative decoding. Closing the generator cancels both requests.

    Both requests have the same settings and seed. The engine alternates between them, so each is measured by its service
    time and not by the clock.
    """
    if not prompt.strip():
        raise MedheadError("the prompt is empty: write something first")
    if settings.proposer == "none":
        raise MedheadError("the proposer 'none' is plain decoding itself: choose another proposer")
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    messages = [*system, {"role": "user", "content": prompt.strip()}]
    token_ids = service.encode_chat(messages, settings.max_new_tokens).token_ids
    seed = draw_seed() if settings.seed is None else settings.seed
    runs: list[RaceRun] = []
    try:
        for changes in ({"proposer": "none", "tree_size": None}, {}):
            handle = service.engine.submit(settings.request(service, token_ids, seed=seed, **changes))
            on_submit(handle)
            runs.append(RaceRun(handle))
        async with aclosing(_follow(runs, interval)) as changed:
            async for _ in changed:
                yield RaceState(runs[0], runs[1])
        yield RaceState(runs[0], runs[1], done=True)
    finally:
        for run in runs:
            run.handle.cancel()


async def _follow(runs: list[RaceRun], interval: float) -> AsyncGenerator[None, None]:
    """Read all streams to their ends; yield after changes, at most once per `interval` seconds."""
    changed = asyncio.Event()

    async def read(run: RaceRun) -> None:
        async for output in run.handle.stream():
            run.stream.add(output)
            changed.set()

    tasks = [asyncio.ensure_future(read(run)) for run in runs]
    try:
        last_update = 0.0
        while not all(task.done() for task in tasks):
            waiter = asyncio.ensure_future(changed.wait())
            pending = [task for task in tasks if not task.done()]
            await asyncio.wait([waiter, *pending], return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            changed.clear()
            for task in tasks:
                if task.done():
                    task.result()  # raises the task's exception
            remaining = interval - (time.perf_counter() - last_update)
            if last_update and remaining > 0:
                await asyncio.sleep(remaining)
            last_update = time.perf_counter()
            yield None
    finally:
        for task in tasks:
            task.cancel()
