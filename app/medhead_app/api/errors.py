"""Errors of the API in OpenAI's format."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import JSONResponse

from medhead.errors import MedheadError
from medhead.serving.request import QueueFullError, Stopped
from medhead_app.service import PromptTooLongError

LOG = logging.getLogger("medhead_app")
RETRY_AFTER = 2  # seconds after which a client may retry when the queue was full
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that is sent to the client; `param` is the field that is wrong, `code` is for programs."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.status, self.headers = status, headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response with the error object."""
        return JSONResponse(self.body(), self.status, self.headers)


def to_api_error(error: MedheadError) -> ApiError:
    """Convert an error of the engine or the service."""
    if isinstance(error, QueueFullError):  # OpenAI's clients wait and retry by themselves
        return ApiError(str(error), code="queue_full", status=429, headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, Stopped):
        return ApiError(str(error), code="engine_stopped", status=503)
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), code="context_length_exceeded")
    return ApiError(str(error), code="invalid_value")


def internal_error() -> ApiError:
    """Return the error for an unexpected exception, whose details go to the log only."""
    return ApiError("internal error; see the server's log", code="internal_error", status=500)
