"""The FastAPI application: API, metrics and page in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medhead_app.api.errors import LOG, ApiError, internal_error
from medhead_app.api.routes import Api
from medhead_app.metrics import Metrics
from medhead_app.middleware import LOCAL_HOSTS, MAX_BODY, Auth, BodyLimit, SameOrigin
from medhead_app.service import Service

SAMPLE_INTERVAL = 1.0  # seconds


def build_app(
    service: Service,
    page: Any = None,
    page_options: dict[str, Any] | None = None,
    *,
    auth: tuple[str, str] | None = None,
    hosts: tuple[str, ...] | None = LOCAL_HOSTS,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """Build the application.

    Args:
        service: the served model.
        page: a `gradio.Blocks` that is mounted at `/` with `page_options`.
        page_options: arguments of `gradio.mount_gradio_app` (theme, css, head, ...).
        auth: user and password for page, API and metrics.
        hosts: names of this server; requests to other names and from pages of other sites are refused. None allows all.
        max_body: largest request body in bytes.
    """
    metrics = Metrics(service.engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(_sample(metrics))
        yield
        sampling.cancel()

    app = FastAPI(title="medhead", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(Api(service, metrics).router)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_exception_handler(Exception, _handle_error)
    if page is not None:
        app = _mount_page(app, page, page_options or {})
    app.add_middleware(BodyLimit, max_bytes=max_body)
    if auth is not None:
        app.add_middleware(Auth, user=auth[0], password=auth[1])
    if hosts is not None:  # the outermost check
        app.add_middleware(SameOrigin, hosts=hosts)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def _mount_page(app: FastAPI, page: Any, page_options: dict[str, Any]) -> FastAPI:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    async def refuse_upload() -> Response:
        raise HTTPException(404, "this server takes no uploads")

    app.add_api_route("/gradio_api/upload", refuse_upload, methods=["POST"], response_model=None)
    defaults: dict[str, Any] = {
        "show_error": False,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "max_file_size": "1mb",
    }
    return gr.mount_gradio_app(app, page, path="/", **(defaults | page_options))


async def _sample(metrics: Metrics) -> None:
    while True:
        metrics.sample()
        await asyncio.sleep(SAMPLE_INTERVAL)


async def _handle_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return ApiError(str(error.detail), status=error.status_code, headers=headers).response()


async def _handle_error(request: Request, error: Exception) -> Response:
    LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return internal_error().response()
