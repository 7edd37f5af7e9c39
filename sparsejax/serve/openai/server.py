"""Runs the HTTP server from the first load to the last request: signals, warm-up before ready, draining."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import uvicorn

from sparsejax.errors import ConfigError
from sparsejax.serve.lifecycle import catch_signals, live
from sparsejax.serve.logs import use_json_logs
from sparsejax.serve.openai.app import make_app
from sparsejax.serve.openai.connection import Connection
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.service import Service

log = logging.getLogger("sparsejax.serve")
ALONE: AbstractAsyncContextManager[Any] = contextlib.nullcontext()
KEEP_ALIVE = 75
"""Seconds that a connection may rest between requests; clients and balancers give theirs up sooner, so that no request
meets a connection that is being closed."""
LAST_WORDS = 1.0
"""Seconds that finished answers get to leave the sockets."""


class Server(uvicorn.Server):
    """Leaves signals to `run`: the first one drains, so the sockets stay open meanwhile."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(options: HttpOptions) -> socket.socket:
    """A listening socket; taken before the model loads, so that a port in use is known at once.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port} ({error.strerror}): choose another host or port."
        ) from error


def make_server(service: Service, options: HttpOptions) -> Server:
    """An HTTP server over `service`; serving and stopping is up to the caller."""
    return Server(
        uvicorn.Config(
            make_app(service, options),
            http=functools.partial(Connection, head_timeout=options.head_timeout),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=options.log_level,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=max(1, round(LAST_WORDS)),
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
    )


async def serve(
    service: Service, options: HttpOptions, sock: socket.socket, beside: AbstractAsyncContextManager[Any] = ALONE
) -> None:
    """Serves until a signal comes. SIGTERM or SIGINT drains; a second one ends the process at once.

    Args:
        beside: entered meanwhile: another server over the same service.

    Raises:
        SparseJaxError: the model cannot be loaded.
    """
    async with beside:
        await _serve(service, options, sock)


async def _serve(service: Service, options: HttpOptions, sock: socket.socket) -> None:
    server = make_server(service, options)
    asked = catch_signals()
    serving = asyncio.create_task(server.serve([sock]))
    serving.add_done_callback(lambda _: asked.set())  # a server that ended by itself ends the rest

    def tell_ready() -> None:
        host, port = sock.getsockname()[:2]
        log.info("ready", extra={"fields": {"address": f"{host}:{port}", "bytes": service.memory()["total"]}})

    try:
        await live(service, asked, options.shutdown_timeout, tell_ready)
    finally:
        server.should_exit = True
        await asyncio.wait({serving})
        await service.stop()


def run(service: Service, options: HttpOptions, beside: AbstractAsyncContextManager[Any] = ALONE) -> None:
    """`serve` on a loop of its own, uvloop where it is installed."""
    use_json_logs(options.log_level)
    sock = listen(options)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(service, options, sock, beside))


def _loop_factory():
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
