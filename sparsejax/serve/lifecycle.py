"""A server's life from its first load to its last request: signals, draining, the end. Knows no protocol."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

from sparsejax.serve.service import Service

log = logging.getLogger("sparsejax.serve")


def catch_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once."""
    asked = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set():
            log.warning("stopped by a second signal")
            os._exit(130)  # the engine's thread may be in the middle of a step; nothing here is worth waiting for
        asked.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return asked


def leave(service: Service) -> None:
    """Ends the process if a model is still being loaded: nothing can stop the compiler, and an interpreter that shuts
    down while a thread is inside it crashes."""
    if service.loads:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def live(service: Service, asked: asyncio.Event, timeout: float, on_ready: Callable[[], None]) -> None:
    """Loads, serves until `asked` is set, and drains for at most `timeout` seconds.

    Raises:
        SparseJaxError: the model cannot be loaded.
    """
    service.start()
    stopping = asyncio.create_task(asked.wait())
    loading = asyncio.create_task(service.loaded())
    try:
        await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            on_ready()
            await stopping
        log.info("draining", extra={"fields": {"requests": service.admission.requests}})
        log.info("drained" if await service.drain(timeout) else "gave up waiting")
    finally:
        loading.cancel()
        stopping.cancel()
