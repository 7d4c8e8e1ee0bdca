"""Bind a port and run the server, in the foreground or in a thread."""

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

CLOSE_AFTER = 1.0  # seconds between the end of all requests and the closing of open connections


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free port."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise MedheadError(f"--host {host!r} with --port {port} is not an address: {error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)  # before the model is loaded, so that a second server fails at once
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise MedheadError(f"port {port} of {host} is in use; choose another one with --port") from None
        raise MedheadError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return bound


def url_of(bound: socket.socket, host: str | None = None) -> str:
    """Return the URL of a bound socket, with `host` in place of its address if given."""
    address, port = bound.getsockname()[:2]
    name = host or ("127.0.0.1" if address in ("0.0.0.0", "::") else address)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Server(uvicorn.Server):
    """A uvicorn server that closes the service, which ends all requests, before it waits for connections to close."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=10, ws="none"
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the service, then the connections; uvicorn calls it."""
        await asyncio.to_thread(self._service.close)
        closing = asyncio.create_task(self._close_connections())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_connections(self) -> None:
        """Close the connections that open pages keep for as long as they exist."""
        await asyncio.sleep(CLOSE_AFTER)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.close()


@contextlib.contextmanager
def run_in_thread(app: FastAPI, service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Run the server in a thread, for tests and measurements; yield its URL."""
    bound = bind(host, port)
    server: Any = Server(app, service)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), name="medhead-http", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
