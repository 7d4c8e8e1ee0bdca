"""Answers on their way: server-sent events, and tickets of clients that went away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request as HttpRequest

from medhead.serving.handle import RequestHandle
from medhead.serving.request import EngineError
from medhead_app.api.answers import Answer
from medhead_app.api.errors import LOG, ApiError, internal

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STOPPED = ApiError("the server is stopping", code="engine_stopped", status=503)


@asynccontextmanager
async def watched(http: HttpRequest, ticket: RequestHandle) -> AsyncIterator[None]:
    """Cancel the ticket as soon as its client is gone, or when the block is left before the end."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        if not ticket.done:
            ticket.cancel()


async def whole_text(http: HttpRequest, ticket: RequestHandle) -> str | None:
    """The text when it is complete; None when its client went away.

    Raises:
        ApiError: the engine failed or is stopping.
    """
    async with watched(http, ticket):
        try:
            text = await ticket.finish()
        except EngineError as error:
            LOG.error("a request failed: %s", error)
            raise ApiError(str(error), code="engine_error", status=500) from None
    if ticket.cancelled:
        return None
    if ticket.result.reason == "cancelled":
        raise STOPPED
    return text


async def events(http: HttpRequest, ticket: RequestHandle, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events of an answer. An error on the way is an event too, and the last one."""
    async with watched(http, ticket):
        try:
            for chunk in answer.first():
                yield event(chunk)
            async for piece in ticket.stream():
                if piece.text:
                    yield event(answer.piece(piece.text))
            if ticket.result.reason == "cancelled":
                yield event(STOPPED.body())
                return
            for chunk in answer.last():
                yield event(chunk)
            yield "data: [DONE]\n\n"
        except EngineError as error:
            LOG.error("a request failed: %s", error)
            yield event(ApiError(str(error), code="engine_error", status=500).body())
        except Exception:
            LOG.exception("a stream failed")
            yield event(internal().body())


def event(content: dict[str, Any]) -> str:
    """One event; ASCII, because some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
