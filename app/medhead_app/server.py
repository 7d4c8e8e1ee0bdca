"""The FastAPI application: API, metrics and page in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medhead_app.api.errors import handle_error
from medhead_app.api.routes import Api
from medhead_app.metrics import Metrics
from medhead_app.middleware import LOCAL_HOSTS, MAX_BODY, MAX_BODY_IMAGES, AccessLog, Auth, BodyLimit, SameOrigin
from medhead_app.service import Service


def build_app(
    service: Service,
    page: Any = None,  # a `gradio.Blocks` that is mounted at `/`
    page_options: dict[str, Any] | None = None,  # arguments of `gradio.mount_gradio_app` (theme, css, head, ...)
    *,
    auth: tuple[str, str] | None = None,  # user and password for page, API and metrics
    hosts: tuple[str, ...] | None = LOCAL_HOSTS,  # names of this server; None allows all
    max_body: int | None = None,  # largest request body in bytes; None for `MAX_BODY`, or `MAX_BODY_IMAGES` with images
) -> FastAPI:
    """Build the application. Requests to other names than `hosts` and from pages of other sites are refused."""
    metrics = Metrics(service.engine)
    if max_body is None:
        max_body = MAX_BODY_IMAGES if service.takes_images else MAX_BODY

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(metrics.sample())
        yield
        sampling.cancel()

    app = FastAPI(title="medhead", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(Api(service, metrics).router)
    app.add_exception_handler(HTTPException, handle_error)
    app.add_exception_handler(Exception, handle_error)
    if page is not None:
        app = _mount_page(app, page, page_options or {})
    app.add_middleware(BodyLimit, max_bytes=max_body)
    if auth is not None:
        app.add_middleware(Auth, user=auth[0], password=auth[1])
    if hosts is not None:  # the first check
        app.add_middleware(SameOrigin, hosts=hosts)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(AccessLog)
    return app


def _mount_page(app: FastAPI, page: Any, page_options: dict[str, Any]) -> FastAPI:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    async def refuse_upload() -> Response:
        raise HTTPException(404, "this server takes no uploads")

    app.add_api_route("/gradio_api/upload", refuse_upload, methods=["POST"], response_model=None)
    off = dict.fromkeys(("show_error", "run_history", "ssr_mode", "mcp_server", "enable_monitoring"), False)
    defaults: dict[str, Any] = {**off, "footer_links": [], "max_file_size": "1mb"}
    return gr.mount_gradio_app(app, page, path="/", **(defaults | page_options))
