"""Refusals at the door: while there is no room, a request is told so before anything of its body is read."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from typing import Any

from fastapi import Response

from sparsejax.serve.errors import Overloaded, Unavailable
from sparsejax.serve.metrics import Metrics
from sparsejax.serve.openai.errors import ApiError, as_api_error
from sparsejax.serve.refusals import RefusalLog
from sparsejax.serve.service import Service

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
"""Routes whose POST takes room."""


class Refusals:
    """Says what `Service.submit` would say anyway, for a fraction of its cost.

    Args:
        body_timeout: seconds in which the rest of a refused body must have arrived.
    """

    def __init__(self, service: Service, metrics: Metrics, body_timeout: float):
        self._service, self._metrics, self._body_timeout = service, metrics, body_timeout
        self._log = RefusalLog()

    def reason(self, scope: Any) -> Overloaded | Unavailable | None:
        """Why this request cannot be taken, whatever its body says; None if it may be."""
        if scope["path"] in GENERATING and scope["method"] == "POST":
            try:
                self._service.check_room()
            except (Overloaded, Unavailable) as error:
                return error
        return None

    async def answer(self, error: Overloaded | Unavailable, scope: Any, receive: Any, send: Any) -> None:
        """Answers at once, and throws away what still comes of the body: closing before that may lose the answer."""
        made = as_api_error(error)
        refusal = _response(made.status, str(made), made.code, math.ceil(made.retry_after))
        self._metrics.count_request(scope["path"], made.status)
        self._log.add(scope["path"])
        await send({"type": "http.response.start", "status": made.status, "headers": refusal.raw_headers})
        await send({"type": "http.response.body", "body": refusal.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._body_timeout):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@functools.lru_cache(maxsize=64)
def _response(status: int, message: str, code: str, retry_after: int) -> Response:
    """The same refusal is sent many times in a row, so it is made once."""
    return ApiError(status, message, code=code, retry_after=retry_after).response()
