"""`AsyncEngine`: the same core behind asyncio, its step loop on a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from sparsejax.config import EngineConfig
from sparsejax.engine.engine import Engine
from sparsejax.engine.request import RequestOutput
from sparsejax.errors import RequestError, SparseJaxError

_Deliver = Callable[[RequestOutput | BaseException], None]


class AsyncEngine:
    """Serves many concurrent callers of one event loop (or several).

    One thread owns the engine: it takes commands (add, abort) between steps and hands outputs back to each
    caller's loop. Closing or cancelling a `generate` iterator aborts its request.

    Args:
        model, config, overrides: as for `Engine`.
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **overrides: Any):
        self.engine = Engine(model, config=config, **overrides)
        self._ids = itertools.count()
        self._commands: list[Callable[[], None]] = []
        self._deliver: dict[str, _Deliver] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sparsejax-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Any, sampling_params: Any = None, *, request_id: str | None = None, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs as its `output_kind` asks, until it has finished.

        Raises:
            RequestError, CapacityError: the request is invalid; every other one is unaffected.
            SparseJaxError: the engine was shut down or has failed.
        """
        request_id = request_id or f"async-{next(self._ids)}"
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

        def deliver(item: RequestOutput | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def add() -> None:
            if request_id in self._deliver:
                raise RequestError(
                    f"request_id {request_id!r} is in use: wait until it finishes, or choose another.",
                    parameter="request_id",
                    value=request_id,
                )
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority)
            self._deliver[request_id] = deliver

        self._submit(add, on_error=deliver)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                if isinstance(item, BaseException):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._submit(lambda: self._abort([request_id]), on_error=lambda error: None)

    async def abort(self, request_id: str | list[str]) -> None:
        """Ends requests; their iterators yield a last output with finish reason ``"abort"``."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._submit(lambda: self._abort(ids, deliver=True), on_error=lambda error: None)

    async def shutdown(self) -> None:
        """Aborts what runs, stops the thread and gives the device memory back."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        self.engine.shutdown()

    def stats(self) -> dict[str, int | float]:
        return self.engine.stats()

    def memory(self) -> dict[str, int]:
        return self.engine.memory()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.shutdown()

    def _submit(self, command: Callable[[], None], on_error: Callable[[BaseException], None]) -> None:
        """Runs `command` on the engine's thread before its next step."""

        def run() -> None:
            try:
                command()
            except SparseJaxError as error:
                on_error(error)

        with self._wake:
            if self._failure is not None or self._stopping:
                on_error(SparseJaxError(f"the engine no longer runs: {self._failure or 'it was shut down'}."))
                return
            self._commands.append(run)
            self._wake.notify()

    def _abort(self, request_ids: list[str], deliver: bool = False) -> None:
        for output in self.engine.abort(request_ids):
            target = self._deliver.pop(output.request_id, None)
            if deliver and target is not None:
                target(output)
        for request_id in request_ids:
            self._deliver.pop(request_id, None)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                for output in self.engine.step():
                    target = self._deliver.get(output.request_id)
                    if output.finished:
                        self._deliver.pop(output.request_id, None)
                    if target is not None:
                        target(output)
        except BaseException as error:  # the thread must tell every caller before it dies
            self._failure = error
            raise
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Runs the queued commands; sleeps while nothing runs. False when it is time to stop."""
        while True:
            with self._wake:
                commands, self._commands = self._commands, []
                if not commands and not self._stopping and not self.engine.has_unfinished():
                    self._wake.wait()
                    continue
            for command in commands:
                command()
            if self._stopping:
                self._abort(list(self._deliver), deliver=True)
                return False
            if self.engine.has_unfinished():
                return True

    def _end_all(self) -> None:
        error = SparseJaxError(f"the engine no longer runs: {self._failure or 'it was shut down'}.")
        with self._wake:
            self._stopping = True
            pending, self._deliver = self._deliver, {}
        for deliver in pending.values():
            deliver(error)
