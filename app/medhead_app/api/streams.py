"""Server-sent events, and the cancellation of requests whose client has disconnected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest

from medhead.serving.handle import RequestHandle
from medhead.serving.request import EngineError, StepOutput
from medhead_app.api.choices import Answer, cancel_all, collect, merged_outputs
from medhead_app.api.errors import LOG, ApiError, internal_error

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STOPPING = ApiError("the server is stopping", code="engine_stopped", status=503)
Chunks = list[dict[str, Any]]


class StreamBuilder(Protocol):
    """What builds the chunks of a stream; `end_event` follows the last of them."""

    end_event: str

    def first_chunks(self) -> Chunks:
        """Return the chunks before the text."""

    def output_chunks(self, index: int, output: StepOutput) -> Chunks:
        """Return the chunks of what a pass emitted for the request with this index."""

    def end_chunks(self, index: int) -> Chunks:
        """Return the chunks at the end of a request."""

    def last_chunks(self) -> Chunks:
        """Return the chunks after the end of all requests."""

    def error_chunk(self, error: ApiError) -> dict[str, Any]:
        """Return the chunk that ends a stream with an error."""


@asynccontextmanager
async def cancel_on_disconnect(http: HttpRequest, handles: list[RequestHandle]) -> AsyncIterator[None]:
    """Cancel the requests when their client disconnects, or when the block ends before they do."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        cancel_all(handles)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        cancel_all(handles)


async def full_answers(http: HttpRequest, handles: list[RequestHandle]) -> list[Answer] | None:
    """Return the answers when all are complete; None if the client has disconnected."""
    async with cancel_on_disconnect(http, handles):
        try:
            answers = await collect(handles)
        except EngineError as error:
            raise _engine_error(error) from None
    if any(handle.cancelled for handle in handles):
        return None
    if any(handle.result.reason == "cancelled" for handle in handles):
        raise STOPPING
    return answers


async def event_stream(http: HttpRequest, handles: list[RequestHandle], builder: StreamBuilder) -> AsyncIterator[str]:
    """Yield the server-sent events of a response; an error is sent as the last event."""
    async with cancel_on_disconnect(http, handles):
        try:
            for chunk in builder.first_chunks():
                yield format_event(chunk)
            async with aclosing(merged_outputs(handles)) as outputs:
                async for index, output in outputs:
                    if output is None and handles[index].result.reason == "cancelled":
                        yield format_event(builder.error_chunk(STOPPING))
                        return
                    for chunk in builder.end_chunks(index) if output is None else builder.output_chunks(index, output):
                        yield format_event(chunk)
            for chunk in builder.last_chunks():
                yield format_event(chunk)
            yield builder.end_event
        except EngineError as error:
            yield format_event(builder.error_chunk(_engine_error(error)))
        except Exception:
            LOG.exception("a stream failed")
            yield format_event(builder.error_chunk(internal_error()))


def format_event(content: dict[str, Any]) -> str:
    """Return one event, in ASCII because some clients take U+2028 for the end of a line; `type` is its name."""
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _engine_error(error: EngineError) -> ApiError:
    LOG.error("a request failed: %s", error)
    return ApiError(str(error), code="engine_error", status=500)
