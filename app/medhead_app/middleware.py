"""Middleware of every request, for the page and the API: password, origin, size, and the access log."""

from __future__ import annotations

import base64
import binascii
import logging
import secrets
import time
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medhead.serving.handle import RequestHandle
from medhead_app.api.errors import ApiError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY = 4 * 2**20  # bytes
MAX_BODY_IMAGES = 20 * 2**20  # where messages may hold images
ACCESS = logging.getLogger("medhead_app.access")
HANDLES = "medhead.handles"  # key of the scope for the engine's requests of an HTTP request
PUBLIC_PATHS = ("/health",)  # paths that need no password


class AccessLog:
    """Log one line for every request of the API: method, path, status, new tokens and seconds; no text of a client's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; log it when the response is complete."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        began, status, handles = time.perf_counter(), 500, list[RequestHandle]()
        scope[HANDLES] = handles

        async def send_noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        finally:
            path, tokens = quote(scope["path"]), sum(handle.result.new_tokens for handle in handles)
            ACCESS.info("%s %s %d %d tokens %.3f s", scope["method"], path, status, tokens, time.perf_counter() - began)


class Auth:
    """Require a user and password by HTTP basic authentication, or the password as a bearer token (an API key)."""

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self.app, self._user, self._password = app, user.encode(), password.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        protected = scope["type"] in ("http", "websocket") and scope["path"] not in PUBLIC_PATHS
        if not protected or self._is_authorized(Headers(scope=scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = "a password is needed: send it by HTTP basic authentication or as the API key"
            headers = {"WWW-Authenticate": 'Basic realm="medhead", charset="UTF-8"'}
            error = ApiError(message, code="invalid_api_key", status=401, headers=headers)
            await error.response()(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return secrets.compare_digest(credentials.strip().encode("latin-1"), self._password)
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(credentials, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        # both are compared, so that the time does not tell which is wrong
        equal = secrets.compare_digest(user, self._user), secrets.compare_digest(password, self._password)
        return all(equal)


class SameOrigin:
    """Refuse requests that a browser sends from pages of other sites than `hosts`, the names of this server."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = LOCAL_HOSTS) -> None:
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or self._is_own(origin):
            await self.app(scope, receive, send)
            return
        error = ApiError("requests from pages of other sites are refused", code="foreign_origin", status=403)
        await error.response()(scope, receive, send)

    def _is_own(self, origin: str) -> bool:
        try:
            name = urlsplit(origin).hostname or ""
        except ValueError:
            return False
        return name in self._hosts or f"[{name}]" in self._hosts


class BodyLimit:
    """Refuse bodies larger than `max_bytes`, by their declared length and while they are read."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the body is larger than {self.max_bytes:,} bytes"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self.max_bytes:
            response = ApiError(message, code="body_too_large", status=413).response()
            if scope["path"].startswith("/gradio_api/"):
                response = JSONResponse({"detail": message}, 413)  # the page shows this field
            await response(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, message)
            return part

        await self.app(scope, receive_limited, send)
