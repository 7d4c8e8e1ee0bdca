"""The application: API, metrics and page in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medhead_app.api.errors import LOG, ApiError, internal
from medhead_app.api.routes import Api
from medhead_app.guards import LOCAL_HOSTS, MAX_BODY, Auth, BodyLimit, SameOrigin
from medhead_app.metrics import Metrics
from medhead_app.service import Service

SAMPLE_EVERY = 1.0  # seconds


def build_app(
    service: Service,
    page: Any = None,
    look: dict[str, Any] | None = None,
    *,
    auth: tuple[str, str] | None = None,
    hosts: tuple[str, ...] | None = LOCAL_HOSTS,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The application.

    Args:
        service: what is served.
        page: a `gradio.Blocks`, mounted at `/`.
        look: arguments of the page's for `gradio.mount_gradio_app` (theme, css, head, ...).
        auth: user and password that page, API and metrics then need.
        hosts: names that the server may be called by; None for any. Other names, and pages of other sites, are refused.
        max_body: most bytes of a request.
    """
    metrics = Metrics(service.engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(_sample(metrics))
        yield
        sampling.cancel()

    app = FastAPI(title="medhead", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service, app.state.metrics = service, metrics
    app.include_router(Api(service, metrics).router)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    if page is not None:
        app = _with_page(app, page, look or {})
    app.add_middleware(BodyLimit, most=max_body)
    if auth is not None:
        app.add_middleware(Auth, user=auth[0], password=auth[1])
    if hosts is not None:  # the outermost check
        app.add_middleware(SameOrigin, hosts=hosts)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return app


def _with_page(app: FastAPI, page: Any, look: dict[str, Any]) -> FastAPI:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    async def no_uploads() -> Response:
        raise HTTPException(404, "nothing can be uploaded here")

    app.add_api_route("/gradio_api/upload", no_uploads, methods=["POST"], response_model=None)
    chosen: dict[str, Any] = {
        "show_error": False,
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "max_file_size": "1mb",
    }
    return gr.mount_gradio_app(app, page, path="/", **(chosen | look))


async def _sample(metrics: Metrics) -> None:
    while True:
        metrics.sample()
        await asyncio.sleep(SAMPLE_EVERY)


async def _http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers) if error.headers else None
    return ApiError(str(error.detail), status=error.status_code, headers=headers).response()


async def _unexpected(http: Request, error: Exception) -> Response:
    LOG.error("%s %s failed", http.method, http.url.path, exc_info=error)
    return internal().response()
