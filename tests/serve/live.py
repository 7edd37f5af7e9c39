"""A real HTTP server on a free port, its loop on a thread, for clients that know nothing of tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import openai

from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.openai.server import listen, make_server
from sparsejax.serve.service import Service

MODEL = "sparsejax-embedded"


@dataclass
class Live:
    """A server that takes requests."""

    service: Service
    url: str
    key: str

    def beside(self, limits: ServiceLimits | None = None) -> Service:
        """Another service over the same engine; it must not be stopped."""
        return Service(self.service.config, limits, load=lambda: self.service.engine)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def settle(self) -> None:
        """Waits until nothing runs; no page may be in use then."""
        deadline = threading.Event()
        for _ in range(500):
            if not self.service.admission.requests:
                break
            deadline.wait(0.02)
        assert self.service.admission.requests == 0
        assert self.service.stats()["kv_live_pages"] == 0


@contextlib.contextmanager
def live(service: Service, options: HttpOptions | None = None, *, stop: bool = True) -> Iterator[Live]:
    """Serves until the block ends; the service is loaded before it begins and, with `stop`, stopped after it."""
    options = options or HttpOptions(port=0)
    sock = listen(options)
    server = make_server(service, options)

    async def main() -> None:
        service.start()
        await server.serve([sock])
        if stop:
            await service.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        asyncio.run(service.loaded())
        host, port = sock.getsockname()[:2]
        yield Live(service, f"http://{host}:{port}", (*options.api_key, "none")[0])
    finally:
        server.should_exit = True
        thread.join()
