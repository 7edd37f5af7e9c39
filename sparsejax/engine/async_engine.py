"""`AsyncEngine`: the same core behind asyncio, its step loop on a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sparsejax.config import EngineConfig
from sparsejax.engine.engine import Engine
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import Prompt
from sparsejax.engine.request import RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.errors import RequestError, SparseJaxError


class AsyncEngine:
    """Serves many concurrent callers of one event loop (or several).

    One thread owns the engine: it takes commands (add, abort) between steps and hands outputs to each caller's
    `Stream`. A second thread reads prompts and compiles grammars, so that long texts never delay a step.

    Args:
        model, config, overrides: as for `Engine`.
        engine: one that exists already, instead of these; the AsyncEngine owns it from now on.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        engine: Engine | None = None,
        **overrides: Any,
    ):
        self.engine = engine or Engine(model, config=config, **overrides)
        self.failure: BaseException | None = None
        self.last_beat = time.monotonic()
        self._ids = itertools.count()
        self._commands: list[tuple[Callable[[], None], Callable[[BaseException], None]]] = []
        self._streams: dict[str, Stream] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._text = ThreadPoolExecutor(1, "sparsejax-text")
        self._thread = threading.Thread(target=self._run, name="sparsejax-engine", daemon=True)
        self._thread.start()
        # Killed inside a step, as the interpreter does with threads that are left, it would take the process down.
        atexit.register(self._end_thread)

    async def generate(
        self, prompt: Any, sampling_params: Any = None, *, request_id: str | None = None, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request's outputs as its `output_kind` asks, until it has finished.

        Closing or cancelling the iterator aborts the request.

        Raises:
            RequestError, CapacityError: the request is invalid; every other one is unaffected.
            SparseJaxError: the engine was shut down or has failed.
        """
        prepared = await self.prepare(prompt, sampling_params)
        async with await self.submit(*prepared, request_id=request_id, priority=priority) as stream:
            async for output in stream:
                yield output

    async def on_text_thread(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Runs what reads or writes text beside the steps: tokenizing, templates, grammars."""
        self._check_running()
        return await asyncio.get_running_loop().run_in_executor(self._text, lambda: function(*args, **options))

    async def prepare(self, prompt: Any, sampling_params: Any = None) -> tuple[Prompt, SamplingParams]:
        """Reads and checks a request without queueing it.

        Raises:
            RequestError, CapacityError: the request is invalid.
        """
        return await self.on_text_thread(self.engine.prepare, prompt, sampling_params)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        on_end: Callable[[], None] | None = None,
        patience: float = float("inf"),
    ) -> Stream:
        """Queues a prepared request and returns once the engine has taken it.

        Args:
            on_end: called once the request has left the engine, on its thread.
            patience: seconds that output may lie unread before the request is aborted.

        Raises:
            RequestError, CapacityError: the engine refused it.
            SparseJaxError: the engine was shut down or has failed.
        """
        request_id = request_id or f"async-{next(self._ids)}"
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = Stream(request_id, prompt.token_ids, params.output_kind, self._close, on_end, patience)

        def answer(error: BaseException | None) -> None:
            if accepted.done():
                return
            accepted.set_result(None) if error is None else accepted.set_exception(error)

        def add() -> None:
            if accepted.cancelled():
                return
            if request_id in self._streams:
                raise RequestError(
                    f"request_id {request_id!r} is in use: wait until it finishes, or choose another.",
                    parameter="request_id",
                    value=request_id,
                )
            self.engine.core.add(request_id, prompt, params, priority)
            self._streams[request_id] = stream
            _call(stream.loop, answer, None)

        self._command(add, on_error=lambda error: _call(stream.loop, answer, error))
        try:
            await accepted
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def abort(self, request_id: str | list[str]) -> None:
        """Ends requests; their streams yield a last output with finish reason ``"abort"``."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._command(lambda: self._abort(ids))

    async def shutdown(self) -> None:
        """Aborts what runs, stops the threads and gives the device memory back."""
        await asyncio.to_thread(self._end_thread)
        atexit.unregister(self._end_thread)
        self._text.shutdown(wait=False, cancel_futures=True)
        self.engine.shutdown()

    def _end_thread(self) -> None:
        """Aborts what runs, and waits for the end of a step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def request_ids(self) -> list[str]:
        """Requests that the engine works on or has queued."""
        return list(self._streams)

    @property
    def idle(self) -> bool:
        return not self._streams and not self._commands

    def stats(self) -> dict[str, int | float]:
        return self.engine.stats()

    def memory(self) -> dict[str, int]:
        return self.engine.memory()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.shutdown()

    def _stopped(self) -> SparseJaxError:
        return SparseJaxError(f"the engine no longer runs: {self.failure or 'it was shut down'}.")

    def _check_running(self) -> None:
        if self.failure is not None or self._stopping:
            raise self._stopped()

    def _command(
        self, command: Callable[[], None], on_error: Callable[[BaseException], None] = lambda error: None
    ) -> None:
        """Runs `command` on the engine's thread before its next step."""
        with self._wake:
            if self.failure is not None or self._stopping:
                on_error(self._stopped())
                return
            self._commands.append((command, on_error))
            self._wake.notify()

    def _close(self, stream: Stream) -> None:
        self._command(lambda: self._forget(stream))

    def _forget(self, stream: Stream) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self.engine.abort(stream.request_id)
            stream.end()

    def _abort(self, request_ids: list[str]) -> None:
        self._deliver(self.engine.abort(request_ids))

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hands outputs to their streams; one wake-up per event loop, however many streams it reads."""
        woken: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if stream.put(output):
                woken.setdefault(stream.loop, []).append(stream)
            if output.finished:
                del self._streams[output.request_id]
            elif stream.stalled():
                stream.fail(SparseJaxError(f"request {output.request_id!r} was aborted: its output was not read."))
                self._forget(stream)
        for loop, streams in woken.items():
            if not _call(loop, _wake_all, streams):
                for stream in streams:
                    self._forget(stream)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._deliver(self.engine.step())
                self.last_beat = time.monotonic()
        except BaseException as error:  # the thread must tell every caller before it dies
            self.failure = error
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
                    self.last_beat = time.monotonic()
                    continue
            for command, on_error in commands:
                try:
                    command()
                except SparseJaxError as error:
                    on_error(error)
            if self._stopping:
                self._abort(list(self._streams))
                return False
            if self.engine.has_unfinished():
                return True

    def _end_all(self) -> None:
        error = self._stopped()
        with self._wake:
            self._stopping = True
            pending, self._streams = self._streams, {}
            commands, self._commands = self._commands, []
        for _, on_error in commands:
            on_error(error)
        for stream in pending.values():
            stream.fail(error)
            _call(stream.loop, stream.wake)


def _wake_all(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake()


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> bool:
    """Calls `function` on a loop from any thread; False if that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True
