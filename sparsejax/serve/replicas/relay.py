"""One HTTP request as data, and its answer by an ASGI application in this process: what travels between processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("sparsejax.serve")
Headers = list[tuple[bytes, bytes]]
Piece = tuple[int, Headers] | bytes
"""Status and headers come first, then parts of the body."""


@dataclass(frozen=True)
class Call:
    """A request that has been read.

    Attributes:
        leads: hashes of its prompt's blocks, for the router.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    client: tuple[str, int] | None
    leads: tuple[int, ...] = ()

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": self.client,
            "server": None,
        }


async def relay(app: Any, call: Call) -> AsyncGenerator[Piece]:
    """What `app` answers to `call`; parts that nobody has taken yet are joined. Closing it is a disconnect."""
    sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    gone = asyncio.Event()
    unread = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await app(call.scope(), receive, sent.put)
        finally:
            sent.put_nowait(None)

    task, complete = asyncio.create_task(work()), False
    try:
        messages: list[dict[str, Any] | None] = []
        while None not in messages:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            given = [message for message in messages if message is not None]
            if given and given[0]["type"] == "http.response.start":
                start = given.pop(0)
                yield start["status"], list(start["headers"])
            complete = any(not message.get("more_body") for message in given)
            if body := b"".join(message.get("body", b"") for message in given):
                yield body
        if not complete:
            await task
    finally:
        gone.set()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) and complete:
            log.debug("the application failed after its answer: %r", error)
