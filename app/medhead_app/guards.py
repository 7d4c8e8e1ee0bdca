"""Who is let in, and with how much: the checks before every request, for the page as for the API."""

from __future__ import annotations

import base64
import binascii
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medhead_app.api.errors import ApiError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY = 4 * 2**20  # bytes
OPEN_PATHS = ("/health",)  # without a password


class Auth:
    """One user and password: HTTP basic, or for programs the password as bearer token (an API key).

    Args:
        app: what is guarded.
        user: name.
        password: of the user.
    """

    def __init__(self, app: ASGIApp, user: str, password: str) -> None:
        self.app, self._user, self._password = app, user.encode(), password.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through or answer 401."""
        if (
            scope["type"] not in ("http", "websocket")
            or scope["path"] in OPEN_PATHS
            or self._known(Headers(scope=scope))
        ):
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = ApiError(
            "a password is needed: HTTP basic, or the password as API key",
            code="invalid_api_key",
            status=401,
            headers={"WWW-Authenticate": 'Basic realm="medhead", charset="UTF-8"'},
        )
        await error.response()(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return secrets.compare_digest(given.strip().encode("latin-1"), self._password)
        if kind.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(given, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        good = secrets.compare_digest(user, self._user), secrets.compare_digest(password, self._password)
        return all(good)


class SameOrigin:
    """Keeps pages of other sites from using a server that listens on this machine alone.

    Args:
        app: what is guarded.
        hosts: names this machine is called by.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] = LOCAL_HOSTS) -> None:
        self.app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through or answer 403."""
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None or self._ours(origin):
            await self.app(scope, receive, send)
            return
        error = ApiError("requests from pages of other sites are refused", code="foreign_origin", status=403)
        await error.response()(scope, receive, send)

    def _ours(self, origin: str) -> bool:
        try:
            name = urlsplit(origin).hostname or ""
        except ValueError:
            return False
        return name in self._hosts or f"[{name}]" in self._hosts


class BodyLimit:
    """Refuses bodies that are too large, before they are read or while they come.

    Args:
        app: what is guarded.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int = MAX_BODY) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let it through or answer 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "")
        if said.isascii() and said.isdigit() and int(said) > self.most:
            await self._error().response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._error().message)
            return message

        await self.app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(f"the body is larger than {self.most:,} bytes", code="body_too_large", status=413)
