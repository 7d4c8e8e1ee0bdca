"""The API for programs: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medhead.errors import MedheadError
from medhead.serving import request as serving
from medhead.serving.handle import RequestHandle
from medhead_app.api.answers import CHAT, COMPLETION, Answer, Shape
from medhead_app.api.errors import LOG, ApiError, internal, said
from medhead_app.api.schema import ChatRequest, Common, CompletionRequest, read_body
from medhead_app.api.streams import HEADERS, events, whole_text
from medhead_app.metrics import Metrics
from medhead_app.service import Service

CLIENT_GONE = 499  # nginx's number; nobody reads it
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class Api:
    """Endpoints over a service.

    Args:
        service: what is served.
        metrics: counts.

    Attributes:
        router: the routes, for an application.
    """

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.router = APIRouter()
        for path, endpoint in (
            ("/v1/chat/completions", self.chat),
            ("/v1/completions", self.completion),
        ):
            self.router.add_api_route(path, _guarded(endpoint), methods=["POST"], response_model=None)
        for path, endpoint in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/health", self.health),
            ("/metrics", self.scrape),
        ):
            self.router.add_api_route(path, _guarded(endpoint), methods=["GET"], response_model=None)
        self.router.add_api_route("/v1/{path:path}", _guarded(self.unknown), methods=METHODS, response_model=None)

    # ---------------------------------------------------------------- endpoints

    async def chat(self, http: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked = read_body(ChatRequest, await _json(http))
        self._check_model(asked.model)
        encoded = await run_in_threadpool(self.service.chat, asked.chat(), 1, False)
        return await self._answer(http, asked, encoded.ids, CHAT)

    async def completion(self, http: Request) -> Response:
        """`POST /v1/completions`."""
        asked = read_body(CompletionRequest, await _json(http))
        self._check_model(asked.model)
        prompt = asked.prompt
        ids = prompt if isinstance(prompt, list) else await run_in_threadpool(self.service.encode, prompt)
        return await self._answer(http, asked, ids, COMPLETION)

    async def models(self, http: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, http: Request) -> Response:
        """`GET /v1/models/{name}`."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._described())

    async def health(self, http: Request) -> Response:
        """`GET /health`: 200 while requests are served, else 503."""
        if self.service.closed or not self.service.engine.running:
            return JSONResponse({"status": "stopped", "model": self.service.name}, 503)
        now = self.service.engine.statistics()
        return JSONResponse(
            {"status": "ok", "model": self.service.name, "running": now.running, "waiting": now.waiting}
        )

    async def scrape(self, http: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def unknown(self, http: Request) -> Response:
        """Everything else under `/v1`."""
        raise ApiError(f"there is no {http.method} {http.url.path} here", code="unknown_url", status=404)

    # ---------------------------------------------------------------- inside

    async def _answer(self, http: Request, asked: Common, ids: list[int], shape: Shape) -> Response:
        request = self._request(asked, ids)
        ticket = self._submit(request, shape.endpoint)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        answer = Answer(shape, self.service.name, ticket, usage)
        if asked.stream:
            stream = events(http, ticket, answer)
            return StreamingResponse(stream, media_type="text/event-stream", headers=HEADERS)
        text = await whole_text(http, ticket)
        return Response(status_code=CLIENT_GONE) if text is None else JSONResponse(answer.whole(text))

    def _request(self, asked: Common, ids: list[int]) -> serving.Request:
        (field, limit), service = asked.limit(), self.service
        if limit is not None and field not in asked.model_fields_set:
            limit = min(limit, service.max_new_tokens)  # a default asks for no more than there is
        elif limit is not None and limit > service.max_new_tokens:
            raise ApiError(f"{field}: at most {service.max_new_tokens}, got {limit}", field, "invalid_value")
        elif limit is not None and len(ids) + limit > service.context:
            raise ApiError(
                f"the prompt has {len(ids)} tokens and {field} is {limit}: together more than the context of "
                f"{service.context}",
                field,
                "context_length_exceeded",
            )
        return service.request(ids, limit, **asked.sampling())

    def _submit(self, request: serving.Request, endpoint: str) -> RequestHandle:
        self.metrics.expect(request, endpoint)
        try:
            return self.service.engine.submit(request)
        except MedheadError as error:
            self.metrics.refused(endpoint, said(error).code or "invalid_value", request)
            raise

    def _check_model(self, name: str) -> None:
        if name != self.service.name:
            raise ApiError(
                f"the model {name[:100]!r} is not here; this server has {self.service.name!r}",
                "model",
                "model_not_found",
                404,
            )

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": 0,
            "owned_by": "medhead",
            "context_length": self.service.context,
        }


async def _json(http: Request) -> bytes:
    kind = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # also keeps other sites' forms out, which browsers send without asking
        raise ApiError(
            "send JSON with the header Content-Type: application/json", code="unsupported_media_type", status=415
        )
    return await http.body()


def _guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Every error of an endpoint as OpenAI's error object; what was not expected is logged, and never shown."""

    async def guarded(http: Request) -> Response:
        try:
            return await endpoint(http)
        except ApiError as error:
            return error.response()
        except MedheadError as error:
            return said(error).response()
        except HTTPException:
            raise
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception:
            LOG.exception("%s %s failed", http.method, http.url.path)
            return internal().response()

    return guarded
