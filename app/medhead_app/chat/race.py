"""A race: the same prompt with and without speculation, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from medhead.errors import MedheadError
from medhead.serving.handle import RequestHandle
from medhead.serving.request import Result
from medhead_app.chat.answer import AUTOMATIC, EVERY, Settings, StreamState, draw_seed
from medhead_app.service import Service


@dataclass
class Runner:
    """One of the two.

    Attributes:
        name: of its proposer.
        ticket: of its request.
        written: its text so far.
    """

    name: str
    ticket: RequestHandle
    written: StreamState = field(default_factory=StreamState)

    @property
    def result(self) -> Result:
        """Of its request."""
        return self.ticket.result

    @property
    def done(self) -> bool:
        """Whether it has reached the end of its text."""
        return self.ticket.done and self.result.reason in ("stop", "length")


@dataclass(frozen=True)
class RaceState:
    """How a race stands.

    Attributes:
        plain: plain decoding.
        guessing: the chosen proposer.
        done: whether both have ended.
    """

    plain: Runner
    guessing: Runner
    done: bool = False

    @property
    def ratio(self) -> float | None:
        """Plain busy seconds by speculative busy seconds; None unless both reached the end."""
        if not (self.done and self.plain.done and self.guessing.done) or self.guessing.result.busy <= 0:
            return None
        return self.plain.result.busy / self.guessing.result.busy

    @property
    def identical(self) -> bool | None:
        """Whether both gave the same tokens; None unless both reached the end."""
        return None if self.ratio is None else self.plain.written.ids == self.guessing.written.ids

    def verdict(self) -> str:
        """One line for the end; empty before."""
        if not self.done:
            return ""
        if self.ratio is None:
            return "stopped before the end: no result"
        return f"{self.ratio:.2f} times as fast · identical text: {'yes' if self.identical else 'no'}"


async def race(
    service: Service,
    prompt: str,
    settings: Settings,
    hold: Callable[[RequestHandle], None] = lambda ticket: None,
    every: float = 2 * EVERY,
) -> AsyncGenerator[RaceState, None]:
    """Let both answer. Closing the generator cancels both.

    Both have the same settings and seed. The engine lets them take turns, so each is measured by the seconds that were
    spent on it, not by the clock.

    Raises:
        MedheadError: the prompt is empty, a request cannot be served, one failed, or the queue is full.
    """
    if not prompt.strip():
        raise MedheadError("the prompt is empty: write something first")
    if settings.proposer == "none":
        raise MedheadError("'none' would race against itself: choose another proposer")
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    ids = service.chat([*system, {"role": "user", "content": prompt.strip()}], settings.max_new_tokens).ids
    seed = draw_seed() if settings.seed is None else settings.seed
    chosen = "hybrid" if settings.proposer == AUTOMATIC else settings.proposer
    runners: list[Runner] = []
    try:
        for name, changes in (("none", {"proposer": "none", "tree_size": None}), (chosen, {})):
            ticket = service.engine.submit(settings.request(service, ids, seed=seed, **changes))
            hold(ticket)
            runners.append(Runner(name, ticket))
        async with aclosing(_together(runners, every)) as rounds:
            async for _ in rounds:
                yield RaceState(runners[0], runners[1])
        yield RaceState(runners[0], runners[1], done=True)
    finally:
        for runner in runners:
            runner.ticket.cancel()


async def _together(runners: list[Runner], every: float) -> AsyncGenerator[None, None]:
    """Follow all; something to show at most every so often, until all have ended."""

    async def follow(runner: Runner) -> None:
        async for piece in runner.ticket.stream():
            runner.written.take(piece)
            changed.set()

    changed = asyncio.Event()
    tasks = [asyncio.ensure_future(follow(runner)) for runner in runners]
    try:
        shown = 0.0
        while not all(task.done() for task in tasks):
            waiter = asyncio.ensure_future(changed.wait())
            await asyncio.wait(
                [waiter, *(task for task in tasks if not task.done())], return_when=asyncio.FIRST_COMPLETED
            )
            waiter.cancel()
            changed.clear()
            for task in tasks:
                if task.done():
                    task.result()  # raises what went wrong
            if (rest := every - (time.perf_counter() - shown)) > 0 and shown:
                await asyncio.sleep(rest)
            shown = time.perf_counter()
            yield None
    finally:
        for task in tasks:
            task.cancel()
