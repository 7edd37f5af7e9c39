"""What surrounds every request: its id, keys, limits per key, the log line and the counters."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from sparsejax.serve.keys import KeyRing
from sparsejax.serve.metrics import Metrics
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.openai.refusals import Refusals
from sparsejax.serve.traces import span

log = logging.getLogger("sparsejax.access")
GUARDED = ("/v1/", "/tokenize", "/detokenize")
MINUTE = 60.0
QUIET = ("/health", "/ping", "/ready", "/metrics", "/load")


class Keys:
    """Who may ask, and how much."""

    def __init__(self, options: HttpOptions):
        self._ring = KeyRing(options.api_key)
        self._per_minute, self._at_once = options.key_requests_per_minute, options.key_concurrency
        self._starts: dict[str, deque[float]] = {}
        self._running: Counter[str] = Counter()

    def caller(self, authorization: bytes) -> str:
        """Who sent this header.

        Raises:
            ApiError: 401 it is none of the keys.
        """
        caller = self._ring.holder(authorization)
        if caller is None:
            raise ApiError(
                401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
        return caller

    def know(self, authorization: bytes) -> bool:
        """Whether this header comes from somebody who may ask."""
        return self._ring.holder(authorization) is not None

    @contextlib.contextmanager
    def running(self, caller: str) -> Iterator[None]:
        """Around a request of `caller`: counts it.

        Raises:
            ApiError: 429 it has too many, or started too many within a minute.
        """
        now = time.monotonic()
        starts = self._starts.setdefault(caller, deque())
        while starts and now - starts[0] >= MINUTE:
            starts.popleft()
        if self._at_once and self._running[caller] >= self._at_once:
            raise _too_many(f"{self._at_once} requests of this key run already", 1.0)
        if self._per_minute and len(starts) >= self._per_minute:
            raise _too_many(f"this key started {self._per_minute} requests within a minute", MINUTE + starts[0] - now)
        if self._per_minute:
            starts.append(now)
        self._running[caller] += 1
        try:
            yield
        finally:
            self._running[caller] -= 1


def _too_many(what: str, retry_after: float) -> ApiError:
    return ApiError(429, f"{what}: try again later.", code="rate_limit_exceeded", retry_after=max(retry_after, 1.0))


def is_guarded(scope: Any) -> bool:
    """Whether a request needs a key."""
    return scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS"


class Access:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, keys: Keys, metrics: Metrics, refusals: Refusals):
        self._app, self._keys, self._metrics, self._refusals = app, keys, metrics, refusals

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        authorization = headers.get(b"authorization", b"")
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
        record: dict[str, Any] = {"request_id": request_id}
        scope.setdefault("state", {})["record"] = record
        start, status = time.monotonic(), 500

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        if self._keys.know(authorization) and (reason := self._refusals.reason(scope)):
            await self._refusals.answer(reason, scope, receive, answer)
            return
        carried = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with contextlib.ExitStack() as stack:
            note = stack.enter_context(span(scope["method"], carried))
            try:
                if is_guarded(scope):
                    record["key"] = caller = self._keys.caller(authorization)
                    stack.enter_context(self._keys.running(caller))
                await self._app(scope, receive, answer)
            except ApiError as error:
                await error.response()(scope, receive, answer)
            finally:
                note(self._note(scope, record, status, time.monotonic() - start), status >= 500)

    def _note(self, scope: Any, record: dict[str, Any], status: int, seconds: float) -> dict[str, Any]:
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.count_request(route, status)
        level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
        fields = {**record, "method": scope["method"], "route": route, "status": status}
        log.log(level, "request", extra={"fields": {**fields, "ms": round(1000 * seconds, 1)}})
        return fields
