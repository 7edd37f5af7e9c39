"""`Stream`: one request's outputs on their way from the engine's thread to one reader on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from sparsejax.engine.params import RequestOutputKind
from sparsejax.engine.request import RequestOutput
from sparsejax.errors import SparseJaxError

COMPACT_AFTER = 256
"""Unread deltas that are kept apart; more are joined into one."""


class Stream:
    """An async iterator over the outputs of one request, in the form that its ``output_kind`` asks for.

    The engine never waits for the reader. Deltas that are not read yet are joined, so a slow reader receives
    fewer and larger ones and holds no more than its request's own tokens; the request's pages are free as soon
    as it has finished, read or not. A reader that lets output lie for `patience` seconds while its request
    still runs is taken for gone, and the request is aborted.

    Closing (``close``, ``aclose``, ``async with``) aborts the request unless it has finished. The engine makes
    streams; `put` and `fail` are its side, called from its thread.

    Attributes:
        request_id: the name of the request in the engine.
        prompt_token_ids: the prompt as the engine reads it.
        loop: the event loop of the reader.
        ended: the engine has put its last output.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        kind: RequestOutputKind,
        on_close: Callable[[Stream], None],
        on_end: Callable[[], None] | None = None,
        patience: float = float("inf"),
    ):
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.loop = asyncio.get_running_loop()
        self.ended = False
        self._kind = kind
        self._on_close = on_close
        self._on_end = on_end
        self._patience = patience
        self._lock = threading.Lock()
        self._unread: list[RequestOutput] = []
        self._unread_since = 0.0
        self._error: BaseException | None = None
        self._ready = asyncio.Event()
        self._done = False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output.

        Raises:
            SparseJaxError: the engine stopped, or gave this reader up.
        """
        if self._done:
            raise StopAsyncIteration
        unread, error, ended = await self._take()
        while not (unread or error or ended):  # woken for what an earlier call has read already
            unread, error, ended = await self._take()
        if not unread:
            self._done = True
            raise error or StopAsyncIteration
        output = join(unread)
        self._done = output.finished
        if error is not None:  # it is due at the next call
            self._ready.set()
        return output

    async def _take(self) -> tuple[list[RequestOutput], BaseException | None, bool]:
        """Waits to be woken; what is unread, the error, and whether nothing more will come."""
        await self._ready.wait()
        with self._lock:
            self._ready.clear()
            unread, self._unread = self._unread, []
            return unread, self._error, self.ended

    async def final(self) -> RequestOutput:
        """Reads to the end and returns the last output; for requests of kind FINAL_ONLY or CUMULATIVE."""
        last = None
        async for output in self:
            last = output
        if last is None:
            raise SparseJaxError(f"request {self.request_id!r} was closed before it had an output.")
        return last

    def close(self) -> None:
        """Aborts the request unless it has finished. Later reads end at once."""
        self._done = True
        if not self.ended:
            self._on_close(self)

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def put(self, output: RequestOutput) -> bool:
        """Takes an output. True if the reader must be woken (`wake`, on its loop)."""
        with self._lock:
            if not self._unread:
                self._unread_since = time.monotonic()
            if self._kind is not RequestOutputKind.DELTA:
                self._unread = []
            elif len(self._unread) >= COMPACT_AFTER:
                self._unread = [join(self._unread)]
            self._unread.append(output)
            asleep = len(self._unread) == 1
        if output.finished:
            self.end()
        return asleep

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error; the reader must be woken."""
        with self._lock:
            self._error = self._error or error
        self.end()

    def end(self) -> None:
        """The request has left the engine."""
        if not self.ended:
            self.ended = True
            if self._on_end is not None:
                self._on_end()

    def stalled(self) -> bool:
        """Whether the reader has let output lie for longer than its patience."""
        with self._lock:
            return bool(self._unread) and time.monotonic() - self._unread_since > self._patience

    def wake(self) -> None:
        self._ready.set()


def join(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """Consecutive deltas of one request as one delta; a single output is returned as it is."""
    outputs = list(outputs)
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    parts: dict[int, list] = {}
    for output in outputs:
        for part in output.outputs:
            parts.setdefault(part.index, []).append(part)
    joined = [
        replace(
            pieces[-1],
            text="".join(piece.text for piece in pieces),
            token_ids=[token for piece in pieces for token in piece.token_ids],
            logprobs=None
            if pieces[-1].logprobs is None
            else [entry for piece in pieces for entry in piece.logprobs or ()],
        )
        for _, pieces in sorted(parts.items())
    ]
    return replace(last, outputs=joined)
