"""Runs the HTTP server from the first load to the last request: signals, warm-up before ready, draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from sparsejax.errors import ConfigError
from sparsejax.serve.logs import use_json_logs
from sparsejax.serve.openai.app import make_app
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.service import Service

log = logging.getLogger("sparsejax.serve")
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
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=options.log_level,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(LAST_WORDS)),
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
    )


async def serve(service: Service, options: HttpOptions, sock: socket.socket) -> None:
    """Serves until a signal comes. SIGTERM or SIGINT drains; a second one ends the process at once.

    Raises:
        SparseJaxError: the model cannot be loaded.
    """
    server = make_server(service, options)
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            log.warning("stopped by a second signal")
            os._exit(130)  # the engine's thread may be in the middle of a step; nothing here is worth waiting for
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    service.start()
    serving = asyncio.create_task(server.serve([sock]))
    stopping = asyncio.create_task(asked.wait())
    loading = asyncio.create_task(service.loaded())
    try:
        await asyncio.wait({stopping, loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not serving.done():
            loading.result()
            host, port = sock.getsockname()[:2]
            log.info("ready", extra={"fields": {"address": f"{host}:{port}", "bytes": service.memory()["total"]}})
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            log.info("draining", extra={"fields": {"requests": service.admission.requests}})
            drained = await service.drain(options.shutdown_timeout)
            log.info("drained" if drained else "gave up waiting")
    finally:
        loading.cancel()
        stopping.cancel()
        server.should_exit = True
        await asyncio.wait({serving})
        await service.stop()


def run(service: Service, options: HttpOptions) -> None:
    """`serve` on a loop of its own, uvloop where it is installed."""
    use_json_logs(options.log_level)
    sock = listen(options)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(service, options, sock))


def _loop_factory():
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
