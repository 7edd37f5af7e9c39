"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any

from fastapi import Response
from pydantic_core import to_json

from sparsejax.engine.stream import Stream
from sparsejax.errors import SparseJaxError
from sparsejax.serve.openai.errors import as_api_error

log = logging.getLogger("sparsejax.serve")
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection; nobody will read an answer."""


async def unless_gone[T](receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGone: it did.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if left := not task.done():
            task.cancel()
            await asyncio.wait({task})
    if left:
        raise ClientGone
    return task.result()


class EventStream(Response):
    """Sends events as they come. Closing the connection, or not reading for `timeout` s, closes `events`.

    Args:
        events: mappings to send, or ready bytes; an error of ours after the first byte is sent as an event.
        timeout: seconds that the client may take to accept one event.
        streams: closed in the end, whatever happens.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any] | bytes],
        timeout: float,
        streams: Iterable[Stream] = (),
        done: bytes = DONE,
    ):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._timeout, self._streams, self._done = events, timeout, streams, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except (ClientGone, TimeoutError):
            log.debug("client gone", extra={"fields": {"path": scope["path"]}})
        finally:
            for stream in self._streams:
                stream.close()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def push(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with contextlib.aclosing(self._events) as events:
            try:
                async for event in events:
                    await push(event if isinstance(event, bytes) else encode(event))
            except SparseJaxError as error:
                await push(encode(as_api_error(error).body()))
        await push(self._done, more=False)


def encode(event: dict[str, Any], name: str | None = None) -> bytes:
    """One event; floats that JSON cannot hold become null."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(event, inf_nan_mode="null") + b"\n\n"
