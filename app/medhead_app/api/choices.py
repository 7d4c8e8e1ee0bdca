"""The choices of a response: the engine's requests that one request of a client becomes, and their outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from medhead.errors import MedheadError
from medhead.serving.engine import Engine
from medhead.serving.handle import RequestHandle
from medhead.serving.logprobs import TokenLogprobs
from medhead.serving.request import Request, Result, StepOutput
from medhead_app.api.errors import ApiError, to_api_error
from medhead_app.metrics import Metrics


@dataclass
class Answer:
    """One complete text."""

    result: Result
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of every token, if they were asked for

    @property
    def mean_logprob(self) -> float:
        """Return the mean log probability of its tokens, by which `best_of` chooses."""
        return sum(one.logprob for one in self.logprobs) / max(1, len(self.logprobs))


def with_seeds(request: Request, count: int) -> list[Request]:
    """Return `count` copies of a request; the seed of copy `i` is the request's seed plus `i`, if it has one."""
    params, seed = request.params, request.params.seed
    seeds = [None if seed is None else (seed + i) % 2**64 for i in range(count)]
    return [replace(request, params=replace(params, seed=one)) for one in seeds]


def check_count(requests: int, field: str, engine: Engine) -> None:
    """Refuse more requests than the engine ever has room for.

    Raises:
        ApiError: names the field.
    """
    room = engine.max_rows + engine.max_queue
    if requests > max(1, room):  # one text waits for room as ever
        message = f"{field}: this request asks for {requests} texts; at most {room} fit the server's batch and queue"
        raise ApiError(message, field, "invalid_value")


def submit_all(engine: Engine, metrics: Metrics, requests: list[Request], endpoint: str) -> list[RequestHandle]:
    """Submit requests to the engine; if one is rejected, cancel those before it.

    Raises:
        MedheadError: the engine rejected one.
    """
    handles: list[RequestHandle] = []
    for request in requests:
        metrics.set_endpoint(request, endpoint)
        try:
            handles.append(engine.submit(request))
        except Exception as error:
            code = to_api_error(error).code if isinstance(error, MedheadError) else "internal_error"
            metrics.count_rejected(request, endpoint, code or "invalid_value")
            cancel_all(handles)
            raise
    return handles


def cancel_all(handles: list[RequestHandle]) -> None:
    """Cancel the requests that have not ended."""
    for handle in handles:
        if not handle.done:
            handle.cancel()


async def merged_outputs(handles: list[RequestHandle]) -> AsyncGenerator[tuple[int, StepOutput | None], None]:
    """Yield the outputs of several requests as they come, each with the index of its request; None at its end.

    Raises:
        EngineError: a request failed.
    """
    arrived: asyncio.Queue[tuple[int, StepOutput | Exception | None]] = asyncio.Queue()

    async def forward(index: int, handle: RequestHandle) -> None:
        try:
            async for output in handle.stream():
                arrived.put_nowait((index, output))
            arrived.put_nowait((index, None))
        except Exception as error:
            arrived.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index, handle)) for index, handle in enumerate(handles)]
    try:
        running = len(tasks)
        while running:
            index, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            running -= item is None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()


async def collect(handles: list[RequestHandle]) -> list[Answer]:
    """Return the complete answer of every request.

    Raises:
        EngineError: a request failed.
    """
    texts: list[list[str]] = [[] for _ in handles]
    answers = [Answer(handle.result) for handle in handles]
    async for index, output in merged_outputs(handles):
        if output is not None:
            texts[index].append(output.text)
            answers[index].logprobs += output.logprobs
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return answers


def best_answers(answers: list[Answer], candidates: int, n: int) -> list[Answer]:
    """Return the `n` answers of every prompt with the largest mean log probability; a prompt has `candidates` answers."""
    if candidates == n:
        return answers
    groups = [answers[start : start + candidates] for start in range(0, len(answers), candidates)]
    return [one for group in groups for one in sorted(group, key=lambda one: -one.mean_logprob)[:n]]
