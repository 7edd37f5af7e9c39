"""A real gRPC server on a free port, its loop on a thread, for clients that know nothing of tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from sparsejax.serve.grpc.client import GrpcClient
from sparsejax.serve.grpc.options import GrpcOptions
from sparsejax.serve.grpc.server import GrpcServer, serving
from sparsejax.serve.service import Service


@dataclass
class LiveGrpc:
    """A server that answers."""

    service: Service
    server: GrpcServer
    loop: asyncio.AbstractEventLoop

    @property
    def target(self) -> str:
        return f"localhost:{self.server.port}"

    def client(self, **options: Any) -> GrpcClient:
        return GrpcClient(self.target, **{"timeout": 60.0, **options})

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.target)

    def settle(self) -> None:
        """Waits until nothing runs; no page may be in use then."""
        wait_for(lambda: self.service.admission.requests == 0)
        assert self.service.stats()["kv_live_pages"] == 0


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def live_grpc(service: Service, options: GrpcOptions | None = None, loaded: bool = True) -> Iterator[LiveGrpc]:
    """Serves until the block ends; the service is started, loaded if asked for, and stopped after it."""
    started, made, asked = threading.Event(), [], []

    async def main() -> None:
        async with serving(service, options or GrpcOptions(port=0)) as server:
            service.start()
            if loaded:
                await service.loaded()
            ask = asyncio.Event()
            made.append(LiveGrpc(service, server, asyncio.get_running_loop()))
            asked.append(ask)
            started.set()
            await ask.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(120)
    if loaded:
        with GrpcClient(made[0].target) as client:
            if not made[0].server.options.api_key and made[0].server.options.tls_cert is None:
                wait_for(client.ready)
    try:
        yield made[0]
    finally:
        made[0].loop.call_soon_threadsafe(asked[0].set)
        thread.join()
