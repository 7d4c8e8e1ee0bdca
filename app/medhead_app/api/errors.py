"""Errors of the API, as OpenAI's clients expect them."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import JSONResponse

from medhead.errors import MedheadError
from medhead.serving.request import QueueFullError, Stopped
from medhead_app.service import PromptTooLongError

LOG = logging.getLogger("medhead_app")
RETRY_AFTER = 2  # seconds after which a client may come back when the queue was full
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told.

    Args:
        message: one line for the person.
        param: name of the field that is wrong.
        code: short name of the error, for programs.
        status: HTTP status.
        headers: of the response.
    """

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
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The object with its status."""
        return JSONResponse(self.body(), self.status, self.headers)


def said(error: MedheadError) -> ApiError:
    """The API's form of an error that engine or service raised."""
    if isinstance(error, QueueFullError):
        return ApiError(
            str(error), code="queue_full", status=429, headers={"Retry-After": str(RETRY_AFTER)}
        )  # OpenAI's clients wait and try again by themselves
    if isinstance(error, Stopped):
        return ApiError(str(error), code="engine_stopped", status=503)
    if isinstance(error, PromptTooLongError):
        return ApiError(str(error), code="context_length_exceeded")
    return ApiError(str(error), code="invalid_value")


def internal() -> ApiError:
    """For what should not have happened: the log knows more."""
    return ApiError("an internal error; the server's log says more", code="internal_error", status=500)
