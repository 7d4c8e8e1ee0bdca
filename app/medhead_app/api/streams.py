"""Server-sent events, and the cancellation of requests whose client has disconnected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request as HttpRequest

from medhead.serving.handle import RequestHandle
from medhead.serving.request import EngineError
from medhead_app.api.errors import LOG, ApiError, internal_error
from medhead_app.api.responses import ResponseBuilder

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STOPPING = ApiError("the server is stopping", code="engine_stopped", status=503)


@asynccontextmanager
async def cancel_on_disconnect(http: HttpRequest, handle: RequestHandle) -> AsyncIterator[None]:
    """Cancel the request when its client disconnects, or when the block ends before the request."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        handle.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        if not handle.done:
            handle.cancel()


async def full_text(http: HttpRequest, handle: RequestHandle) -> str | None:
    """Return the text when it is complete; None if the client has disconnected."""
    async with cancel_on_disconnect(http, handle):
        try:
            text = await handle.finish()
        except EngineError as error:
            raise _engine_error(error) from None
    if handle.cancelled:
        return None
    if handle.result.reason == "cancelled":
        raise STOPPING
    return text


async def event_stream(http: HttpRequest, handle: RequestHandle, builder: ResponseBuilder) -> AsyncIterator[str]:
    """Yield the server-sent events of a response; an error is sent as the last event."""
    async with cancel_on_disconnect(http, handle):
        try:
            for chunk in builder.first_chunks():
                yield format_event(chunk)
            async for output in handle.stream():
                if output.text:
                    yield format_event(builder.text_chunk(output.text))
            if handle.result.reason == "cancelled":
                yield format_event(STOPPING.body())
                return
            for chunk in builder.last_chunks():
                yield format_event(chunk)
            yield "data: [DONE]\n\n"
        except EngineError as error:
            yield format_event(_engine_error(error).body())
        except Exception:
            LOG.exception("a stream failed")
            yield format_event(internal_error().body())


def format_event(content: dict[str, Any]) -> str:
    """Return one event, in ASCII because some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _engine_error(error: EngineError) -> ApiError:
    LOG.error("a request failed: %s", error)
    return ApiError(str(error), code="engine_error", status=500)
