"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse

from sparsejax.errors import CapacityError, RequestError, SparseJaxError
from sparsejax.serve.errors import Overloaded, Unavailable

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        param: the field that is wrong, or None.
        code: a fixed text that programs can look at, or None.
        retry_after: seconds for the Retry-After header, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        # Text that a client sent may hold what UTF-8 cannot; the answer must be sendable all the same.
        message = str(self).encode("utf-8", "backslashreplace").decode()
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


STATUS = {"conversation_gone": 404, "conversation_busy": 409}
"""Of errors in a request that are not 400, by their code."""


def as_api_error(error: SparseJaxError) -> ApiError:
    """The answer for an error of ours."""
    if isinstance(error, RequestError):
        return ApiError(STATUS.get(error.code, 400), str(error), param=error.parameter, code=error.code)
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, Overloaded):
        return ApiError(503, str(error), code="overloaded", retry_after=error.retry_after)
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", retry_after=error.retry_after)
    return ApiError(500, str(error), code="engine_error")
