"""`Service`: one engine behind any number of servers, with bounds, states and an orderly end.

It knows no protocol: HTTP and gRPC servers turn their messages into `submit` and its `Stream` into theirs.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.engine.chat import render_chat
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import read_prompt
from sparsejax.engine.stream import Stream
from sparsejax.engine.timings import Timings
from sparsejax.errors import RequestError, SparseJaxError
from sparsejax.serve.admission import Admission, ServiceLimits, Ticket
from sparsejax.serve.errors import Overloaded, Unavailable

POLL_SECONDS = 0.02
EMBEDDED_NAME = "sparsejax-embedded"


class Status(enum.Enum):
    """Where a service stands. Only READY takes requests; FAILED and STOPPED are final."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Service:
    """Owns the engine of a server.

    ```python
    service = Service(EngineConfig(warmup="full"))
    service.start()                       # loads and warms on a thread; `status` tells how far it is
    await service.loaded()
    async with await service.submit("Once upon a time", SamplingParams(output_kind="DELTA")) as stream:
        async for output in stream: ...
    await service.drain(timeout=30.0)     # finish what runs, take nothing new
    await service.stop()
    ```

    Args:
        config: settings of the engine.
        limits: how much is accepted at once.
        load: makes the engine, on the loading thread; None builds it from `config`.

    Attributes:
        admission: what is accepted right now.
        rejected: refused requests by reason: ``unavailable``, ``overloaded``, ``invalid``.
        created: when the service was made, in seconds since 1970.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: ServiceLimits | None = None,
        *,
        load: Callable[[], AsyncEngine] | None = None,
    ):
        self.config = config
        self.limits = limits or ServiceLimits()
        self.admission = Admission(self.limits)
        self.rejected: Counter[str] = Counter()
        self.created = int(time.time())
        self.failure: BaseException | None = None
        self._load = load or (lambda: AsyncEngine(config=config))
        self._status = Status.LOADING
        self._engine: AsyncEngine | None = None
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._ids = itertools.count()
        self._prefix = uuid.uuid4().hex[:8]
        self._loader = threading.Thread(target=self._run_load, name="sparsejax-load", daemon=True)

    def start(self) -> None:
        """Begins to load; returns at once. Call it once."""
        self._loader.start()

    @property
    def loads(self) -> bool:
        """Whether the loading thread is at work, be it that nobody waits for it any more."""
        return self._loader.is_alive()

    def _run_load(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self.failure, self._status = error, Status.FAILED
            self._settled.set()
            if not isinstance(error, SparseJaxError):
                raise
            return
        with self._lock:
            self._engine = engine
            if self._status is Status.LOADING:
                self._status = Status.READY
            stopped = self._status is Status.STOPPED
            self._settled.set()
        if stopped:
            asyncio.run(engine.shutdown())

    async def loaded(self) -> None:
        """Waits until requests are taken.

        Raises:
            SparseJaxError: the model or the settings are wrong; the same error as `Engine` raises.
        """
        while not self._settled.is_set():
            await asyncio.sleep(POLL_SECONDS)
        if self.failure is not None:
            raise self.failure

    @property
    def status(self) -> Status:
        failed = self._engine is not None and self._engine.failure is not None
        return Status.FAILED if failed and self._status is not Status.STOPPED else self._status

    @property
    def alive(self) -> bool:
        """Whether waiting for this process makes sense: it loads, or its engine makes steps."""
        if self.status in (Status.FAILED, Status.STOPPED):
            return False
        engine = self._engine
        return (
            engine is None or engine.idle or time.monotonic() - engine.last_beat < self.limits.stuck_after
        )

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            Unavailable: it is not there, or takes nothing any more.
        """
        self._check_ready()
        return self._engine

    def _check_ready(self) -> None:
        status = self.status
        if self._engine is None or status is not Status.READY:
            self.rejected["unavailable"] += 1
            raise Unavailable(f"the server is {status.value} and takes no requests now. Try again later.")

    def check_room(self) -> None:
        """Takes nothing; for servers, before they read a request.

        Raises:
            Unavailable, Overloaded: what `submit` would raise now, whatever is asked for.
        """
        self._check_ready()
        try:
            self.admission.check_room()
        except Overloaded:
            self.rejected["overloaded"] += 1
            raise

    def names(self, served: Sequence[str]) -> tuple[str, ...]:
        """What the model is called by clients: `served`, or where it came from."""
        return tuple(served) or (self.config.model or EMBEDDED_NAME,)

    def new_id(self, kind: str) -> str:
        """A request id that no other service has, such as ``cmpl-1f0c62aa-17``."""
        return f"{kind}-{self._prefix}-{next(self._ids)}"

    async def submit(
        self, prompt: Any, params: Any = None, *, request_id: str | None = None, priority: int = 0
    ) -> Stream:
        """Queues one request. Whatever is wrong with it is raised here, before anything is streamed.

        Args:
            prompt: text, token ids, ``{"prompt_token_ids": [...]}`` or what `render` returned.
            params: `SamplingParams` or a mapping; its ``output_kind`` says what the stream carries.
            priority: smaller runs first.

        Raises:
            Unavailable, Overloaded: not now. RequestError, CapacityError: never.
        """
        engine = self.engine
        ticket: Ticket | None = None
        try:
            params = SamplingParams.coerce(params)
            ticket = self.admission.take(params.n)
            read, params = await engine.prepare(prompt, params)
            ticket.add_tokens(len(read.token_ids))
            return await engine.submit(
                read,
                params,
                request_id=request_id or self.new_id("request"),
                priority=priority,
                on_end=ticket.release,
                patience=self.limits.patience,
            )
        except BaseException as error:
            if ticket is not None:
                ticket.release()
            if isinstance(error, Overloaded):
                self.rejected["overloaded"] += 1
            elif isinstance(error, SparseJaxError):
                self.rejected["invalid"] += 1
            raise

    async def abort(self, request_ids: str | list[str]) -> None:
        """Ends requests; their streams yield a last output with finish reason ``"abort"``."""
        if self._engine is not None:
            await self._engine.abort(request_ids)

    async def render(self, messages: Any, /, **options: Any) -> dict[str, Any]:
        """A conversation as a prompt for `submit`, through the model's chat template; options as for `Engine.chat`.

        Raises:
            RequestError: the template refuses the messages, or there is none.
        """
        engine = self.engine
        return await engine.on_text_thread(render_chat, engine.engine.tokenizer, messages, **options)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        engine = self.engine
        tokenizer = self._tokenizer(engine)
        return await engine.on_text_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: list[int]) -> str:
        engine = self.engine
        tokenizer = self._tokenizer(engine)
        read_prompt(token_ids, None, engine.engine.core.runner.vocab_size)  # refuses ids of no token
        return await engine.on_text_thread(tokenizer.decode, token_ids)

    def _tokenizer(self, engine: AsyncEngine) -> Any:
        if engine.engine.tokenizer is None:
            raise RequestError("this model has no tokenizer: pass token ids.", parameter="prompt")
        return engine.engine.tokenizer

    def stats(self) -> dict[str, int | float]:
        """The engine's counters; empty while there is no engine."""
        if self._engine is None or self._status is Status.STOPPED:
            return {}
        return self._engine.stats()

    def timings(self) -> Timings:
        """The engine's histograms; empty while there is no engine."""
        if self._engine is None or self._status is Status.STOPPED:
            return Timings()
        return self._engine.engine.core.timings

    def memory(self) -> dict[str, int]:
        """The engine's bytes by component; empty while there is no engine."""
        if self._engine is None or self._status is Status.STOPPED:
            return {}
        return self._engine.memory()

    async def drain(self, timeout: float) -> bool:
        """Takes nothing new and waits until everything accepted has left; True if it has within `timeout` s.

        What is left then is aborted: its streams end with finish reason ``"abort"``.
        """
        if self._status in (Status.LOADING, Status.READY):
            self._status = Status.DRAINING
        deadline = time.monotonic() + timeout
        while self.admission.requests and self.status is Status.DRAINING:
            if time.monotonic() >= deadline:
                if self._engine is not None:
                    await self._engine.abort(self._engine.request_ids())
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def stop(self) -> None:
        """Aborts what still runs, ends the threads and gives the device memory back. Calling it twice is fine.

        A model that still loads is given up when it has loaded; this does not wait for it.
        """
        with self._lock:
            if self._status is Status.STOPPED:
                return
            self._status = Status.STOPPED
            engine = self._engine
        if engine is not None:
            await engine.shutdown()
