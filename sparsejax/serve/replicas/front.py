"""What clients talk to: reads a request, sends it to a replica and passes the answer on. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from sparsejax.errors import SparseJaxError
from sparsejax.serve.openai.access import Keys, is_guarded
from sparsejax.serve.openai.body import receive_body
from sparsejax.serve.openai.errors import ApiError, as_api_error
from sparsejax.serve.openai.events import ClientGone, unless_gone
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.replicas.prefix import leads
from sparsejax.serve.replicas.relay import Call, Piece

Forward = Callable[[Call], AsyncGenerator[Piece]]
Report = dict[str, Any]
"""What a replica says of itself: ``replica``, ``status``, ``requests`` and ``metrics``, Prometheus' text."""


def make_front(options: HttpOptions, forward: Forward, reports: Callable[[], Awaitable[list[Report]]]) -> Starlette:
    """The application of a front.

    Args:
        options: keys, limits of keys and of bodies; everything else is the replicas' business.
        forward: asks a replica and yields its answer; closing it aborts the request. Raises Overloaded, Unavailable.
        reports: what every replica says now.
    """

    async def metrics(request: Request) -> Response:
        return Response(merged(await reports()), media_type="text/plain; version=0.0.4")

    async def ready(request: Request) -> Response:
        states = {report["replica"]: report["status"] for report in await reports()}
        return JSONResponse({"replicas": states}, 200 if "ready" in states.values() else 503)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ready"})  # Ray restarts replicas that are not alive

    async def load(request: Request) -> Response:
        return JSONResponse({"server_load": sum(report["requests"] for report in await reports())})

    own = {"/metrics": metrics, "/ready": ready, "/health": health, "/ping": health, "/load": load}
    routes = [Route(path, endpoint) for path, endpoint in own.items()]
    return Starlette(routes=[*routes, Mount("/", Front(options, forward))])


def merged(reports: list[Report]) -> bytes:
    """The metrics of all replicas as one text, each value with the label ``replica``."""
    families: dict[str, Metric] = {}
    for report in reports:
        for family in text_string_to_metric_families(report["metrics"]):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.samples.append(sample._replace(labels={**sample.labels, "replica": report["replica"]}))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    return generate_latest(registry)


class _Collected:
    def __init__(self, families: dict[str, Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())


class Front:
    """ASGI application that answers through replicas. Limits of keys hold over all of them."""

    def __init__(self, options: HttpOptions, forward: Forward):
        self._options, self._forward, self._keys = options, forward, Keys(options)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        with contextlib.ExitStack() as stack:
            try:
                request = Request(scope, receive)
                if is_guarded(scope):
                    caller = self._keys.caller(request.headers.get("authorization", "").encode("latin-1"))
                    stack.enter_context(self._keys.running(caller))
                body = await receive_body(request, self._options)
                call = Call(
                    *(scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), body),
                    client=scope.get("client"),
                    leads=leads(body),
                )
                await unless_gone(receive, self._pass_on(call, send))
            except ClientGone:
                pass
            except ApiError as error:
                await error.response()(scope, receive, send)

    async def _pass_on(self, call: Call, send: Any) -> None:
        """Sends what a replica answers.

        Raises:
            ApiError: none answered; nothing was sent.
        """
        started = False
        async with contextlib.aclosing(self._forward(call)) as pieces:
            try:
                async for piece in pieces:
                    if isinstance(piece, tuple):
                        status, headers = piece
                        await send({"type": "http.response.start", "status": status, "headers": headers})
                        started = True
                    else:
                        async with asyncio.timeout(self._options.send_timeout):
                            await send({"type": "http.response.body", "body": piece, "more_body": True})
            except SparseJaxError as error:
                if started:  # the replica is lost; a connection that breaks off says so
                    raise
                raise as_api_error(error) from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})
