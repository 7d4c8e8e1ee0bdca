"""Listening: the port, the server in the foreground or in a thread, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from medhead.errors import MedheadError
from medhead_app.service import Service

GRACE = 1.0  # seconds that answers have to end properly; then their connections are cut


def bind(host: str, port: int) -> socket.socket:
    """A socket of one's own on that address; port 0 takes a free one.

    Raises:
        MedheadError: the port is taken or not allowed, or the address is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise MedheadError(f"--host {host!r} with --port {port} is no address: {error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)  # now, so that a second server learns at once that the port is taken
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise MedheadError(f"port {port} of {host} is in use; choose another one with --port") from None
        raise MedheadError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return bound


def address_of(bound: socket.socket, shown: str | None = None) -> str:
    """The address for a browser."""
    host, port = bound.getsockname()[:2]
    name = shown or ("127.0.0.1" if host in ("0.0.0.0", "::") else host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Server(uvicorn.Server):
    """uvicorn's server that ends what is being decoded before it waits for its connections to close.

    Args:
        app: the application.
        service: closed at the end.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=10,
                ws="none",
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn when it was told to stop."""
        await asyncio.to_thread(self._service.close)
        hanging_up = asyncio.create_task(self._hang_up())
        await super().shutdown(sockets)
        hanging_up.cancel()

    async def _hang_up(self) -> None:
        """Pages in browsers keep a connection open for as long as they are there."""
        await asyncio.sleep(GRACE)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.close()


@contextlib.contextmanager
def in_thread(app: FastAPI, service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The server in a thread, for tests and measurements; gives its address.

    Raises:
        MedheadError: the port is taken.
    """
    bound = bind(host, port)
    server: Any = Server(app, service)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), name="medhead-http", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield address_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
