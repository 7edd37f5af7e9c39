"""One HTTP connection: what the web server makes of it, and bounds on the time and size of a request's head.

The web server waits for a head as long as it takes, and so would hold a socket for each client that sends one byte
now and then. The bodies that a route reads are bounded where they are read (`body.py`); what nobody reads counts as
time between heads.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sparsejax.serve.openai.errors import ApiError

MOST_HEAD_BYTES = 1 << 16


class Connection(HttpToolsProtocol):
    """Closes itself when a client takes too long, or too many bytes, to say what it wants.

    Args:
        head_timeout: seconds in which a head must have arrived, from the connection's start or its first byte.
        given: what the web server gives its protocols.
    """

    def __init__(self, *, head_timeout: float, **given: Any):
        super().__init__(**given)
        self._head_timeout, self._head_bytes = head_timeout, 0
        self._in_head = False
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the head of the request is larger than {MOST_HEAD_BYTES:,} bytes.")
        if self._deadline is None and self._is_idle:
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._head_timeout, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._in_head:
            self._refuse(408, f"the head of the request did not arrive within {self._head_timeout} s.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answers what is no request, unless an answer to an earlier one is on its way, and closes."""
        if self._is_idle:
            body = to_json(ApiError(status, message).body())
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
