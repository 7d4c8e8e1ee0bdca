"""Routes of the API: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from medhead.serving import request as serving
from medhead.serving.handle import RequestHandle
from medhead_app.api.choices import check_count, submit_all, with_seeds
from medhead_app.api.conformance import html_page
from medhead_app.api.errors import CLIENT_CLOSED, ApiError, handle_error
from medhead_app.api.logprobs import TokenTexts
from medhead_app.api.responses import CHAT, COMPLETIONS, Endpoint, ResponseBuilder
from medhead_app.api.responses_builder import ResponsesBuilder
from medhead_app.api.responses_schema import ResponsesRequest
from medhead_app.api.schema import ChatRequest, CompletionRequest, GenerationRequest, parse_body
from medhead_app.api.streams import HEADERS, event_stream, full_answers
from medhead_app.api.tools.plan import ToolPlan, ToolPlanner
from medhead_app.chat_encoder import EncodedChat
from medhead_app.images import MAX_IMAGES, ImageFile
from medhead_app.metrics import Metrics
from medhead_app.middleware import HANDLES
from medhead_app.service import Service

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints of a service; `router` holds their routes for a FastAPI application."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.token_texts = cache(lambda: TokenTexts(service.tokenizer))
        self.tool_planner = cache(lambda: ToolPlanner(service.tokenizer, service.tool_parser))
        self.router = APIRouter()
        routes: list[tuple[str, Handler, list[str]]] = [
            ("/v1/chat/completions", self.chat_completions, ["POST"]),
            ("/v1/completions", self.completions, ["POST"]),
            ("/v1/responses", self.responses, ["POST"]),
            ("/v1/models", self.list_models, ["GET"]),
            ("/v1/models/{name:path}", self.get_model, ["GET"]),
            ("/health", self.health, ["GET"]),
            ("/metrics", self.get_metrics, ["GET"]),
            ("/docs", self.get_docs, ["GET"]),
            ("/v1/{path:path}", self.not_found, METHODS),
        ]
        for path, handler, methods in routes:
            self.router.add_api_route(path, _with_openai_errors(handler), methods=methods, response_model=None)

    async def chat_completions(self, http: Request) -> Response:
        """Handle `POST /v1/chat/completions`."""
        body = parse_body(ChatRequest, await _read_json(http))
        self._check_model(body.model)
        check_count(body.candidates, "n", self.service.engine)
        plan, *prompts = await run_in_threadpool(self._encode, body, "messages")
        return await self._respond(http, body, prompts, CHAT, plan=plan)

    async def completions(self, http: Request) -> Response:
        """Handle `POST /v1/completions`."""
        body = parse_body(CompletionRequest, await _read_json(http))
        self._check_model(body.model)
        field = "prompt" if body.candidates == 1 else "n"
        check_count(len(body.prompt) * body.candidates, field, self.service.engine)
        encode = self.service.encode
        texts = [one if isinstance(one, list) else await run_in_threadpool(encode, one) for one in body.prompt]
        prompts = [EncodedChat(ids) for ids in texts]
        return await self._respond(http, body, prompts, COMPLETIONS, body.prompt if body.echo else [])

    async def responses(self, http: Request) -> Response:
        """Handle `POST /v1/responses`."""
        body = parse_body(ResponsesRequest, await _read_json(http))
        self._check_model(body.model)
        plan, prompt = await run_in_threadpool(self._encode, body, "input")
        requests = [self._build_request(body, prompt, plan)]
        del prompt  # see `_answer`

        def new_builder(handles: list[RequestHandle]) -> ResponsesBuilder:
            return ResponsesBuilder(body, handles[0], plan)

        return await self._answer(http, requests, body.stream, "responses", new_builder)

    async def list_models(self, http: Request) -> Response:
        """Handle `GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def get_model(self, http: Request) -> Response:
        """Handle `GET /v1/models/{name}`."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model_object())

    async def health(self, http: Request) -> Response:
        """Handle `GET /health`: 200 while the engine runs, otherwise 503."""
        if self.service.closed or not self.service.engine.running:
            return JSONResponse({"status": "stopped", "model": self.service.name}, 503)
        totals = self.service.engine.statistics()
        status = {"status": "ok", "model": self.service.name, "running": totals.running, "waiting": totals.waiting}
        return JSONResponse(status)

    async def get_metrics(self, http: Request) -> Response:
        """Handle `GET /metrics`, for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def get_docs(self, http: Request) -> Response:
        """Handle `GET /docs`: endpoints and fields as a page."""
        return HTMLResponse(html_page(self.service.name))

    async def not_found(self, http: Request) -> Response:
        """Answer every other request under `/v1`."""
        raise ApiError(f"there is no {http.method} {http.url.path} here", code="unknown_url", status=404)

    async def _respond(
        self,
        http: Request,
        body: GenerationRequest,
        prompts: list[EncodedChat],
        endpoint: Endpoint,
        echoed: Sequence[str | list[int]] = (),
        plan: ToolPlan | None = None,
    ) -> Response:
        candidates = body.candidates
        requests = [
            one for prompt in prompts for one in with_seeds(self._build_request(body, prompt, plan), candidates)
        ]
        prompts.clear()  # see `_answer`
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        texts = self.token_texts() if body.wants_logprobs else None

        def new_builder(handles: list[RequestHandle]) -> ResponseBuilder:
            echoes = [one if isinstance(one, str) else self.service.decode(one) for one in echoed]
            return ResponseBuilder(
                endpoint, self.service.name, handles, candidates, body.n, include_usage, texts, echoes, plan
            )

        return await self._answer(http, requests, body.stream, endpoint.name, new_builder)

    async def _answer(
        self,
        http: Request,
        requests: list[serving.Request],
        stream: bool,
        endpoint: str,
        new_builder: Callable[[list[RequestHandle]], ResponseBuilder | ResponsesBuilder],
    ) -> Response:
        handles = submit_all(self.service.engine, self.metrics, requests, endpoint)
        requests.clear()  # the engine frees the images once it has read them
        http.scope.get(HANDLES, []).extend(handles)
        builder = new_builder(handles)
        if stream:
            events = event_stream(http, handles, builder)
            return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)
        answers = await full_answers(http, handles)
        return Response(status_code=CLIENT_CLOSED) if answers is None else JSONResponse(builder.response(answers))

    def _encode(self, body: ChatRequest | ResponsesRequest, field: str) -> tuple[ToolPlan | None, EncodedChat]:
        """Return the plan of the tools that may be called, and the prompt."""
        messages, wanted = body.template_messages(), body.tool_request()
        self._check_images(messages, field)
        planner = self.tool_planner()
        planner.check_messages(messages, field)
        plan = None if wanted is None else planner.plan(wanted)
        tools = [] if plan is None else plan.tools
        return plan, self.service.encode_chat(messages, 1, truncate=False, tools=tools)

    def _check_images(self, messages: list[dict[str, Any]], field: str) -> None:
        """Refuse images where the model reads none, and too many; `field` is the field that holds the messages."""
        contents = [one["content"] if isinstance(one["content"], list) else [] for one in messages]
        count = sum(isinstance(part, ImageFile) for parts in contents for part in parts)
        if count and not self.service.takes_images:
            message = f"{field}: images cannot be used: the model {self.service.name!r} is served for text only"
            raise ApiError(message, field, "invalid_value")
        if count > MAX_IMAGES:
            raise ApiError(f"{field}: at most {MAX_IMAGES} images are allowed, got {count}", field, "invalid_value")

    def _build_request(
        self, body: GenerationRequest, prompt: EncodedChat, plan: ToolPlan | None = None
    ) -> serving.Request:
        (field, limit), service, token_ids = body.token_limit(), self.service, prompt.token_ids
        if limit is not None and field not in body.model_fields_set:
            limit = min(limit, service.max_new_tokens)  # OpenAI's default may be above the server's limit
        elif limit is not None and limit > service.max_new_tokens:
            raise ApiError(f"{field} must be at most {service.max_new_tokens}, got {limit}", field, "invalid_value")
        elif limit is not None and len(token_ids) + limit > service.context:
            both = f"the prompt has {len(token_ids)} tokens and {field} is {limit}"
            message = f"{both}, together more than the context of {service.context}"
            raise ApiError(message, field, "context_length_exceeded")
        fields = body.request_fields(service.temperature)
        if plan is not None:
            fields |= {"grammar": plan.grammar, "special_tokens": plan.special_tokens}
        return service.request(token_ids, limit, model_inputs=prompt.model_inputs, **fields)

    def _check_model(self, name: str) -> None:
        if name != self.service.name:
            message = f"there is no model {name[:100]!r}; this server has {self.service.name!r}"
            raise ApiError(message, "model", "model_not_found", 404)

    def _model_object(self) -> dict[str, Any]:
        model = {"id": self.service.name, "object": "model", "created": self.service.created, "owned_by": "medhead"}
        return model | {"context_length": self.service.context}


async def _read_json(http: Request) -> bytes:
    media_type = http.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":  # this also refuses forms of other sites, which browsers send unasked
        message = "send JSON with the header Content-Type: application/json"
        raise ApiError(message, code="unsupported_media_type", status=415)
    return await http.body()


def _with_openai_errors(handler: Handler) -> Handler:
    async def handle(http: Request) -> Response:
        try:
            return await handler(http)
        except Exception as error:
            return await handle_error(http, error)

    return handle
