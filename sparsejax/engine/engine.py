"""`Engine`: the synchronous face. Prompts in, tokens and text out."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sparsejax.config import EngineConfig
from sparsejax.engine.build import build_core
from sparsejax.engine.chat import render_chat
from sparsejax.engine.core import EngineCore
from sparsejax.engine.params import RequestOutputKind, SamplingParams
from sparsejax.engine.prompts import Prompt, read_prompt, split_prompts
from sparsejax.engine.request import RequestOutput
from sparsejax.engine.stats import engine_stats
from sparsejax.engine.validate import reject
from sparsejax.errors import ConfigError, RequestError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.loader import LoadedModel


class Engine:
    """Serves one model from one process.

    ```python
    with Engine("path/or/hub-id", max_model_len=131072) as engine:
        outputs = engine.generate(["..."], SamplingParams(temperature=0.0, max_tokens=128))
    ```

    Args:
        model: local checkpoint directory or hub id; None is the checkpoint that ships in the package.
        config: settings; keyword overrides win over it.

    Raises:
        ConfigError, ModelError, CapacityError, StoreError: what was given, what is allowed, what to do.
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **overrides: Any):
        self._start(EngineConfig.make(model, config, **overrides))

    @classmethod
    def from_loaded(
        cls,
        model: LoadedModel,
        tokenizer: Any = None,
        *,
        config: EngineConfig | None = None,
        **overrides: Any,
    ) -> Engine:
        """An engine over parameters that are in memory already, for example between training steps."""
        engine = cls.__new__(cls)
        engine._start(EngineConfig.make(None, config, **overrides), model, tokenizer)
        return engine

    def _start(self, config: EngineConfig, model: LoadedModel | None = None, tokenizer: Any = None) -> None:
        self.config = config
        self._core: EngineCore | None = build_core(config, model, tokenizer)
        self._ids = itertools.count()

    @property
    def core(self) -> EngineCore:
        if self._core is None:
            raise ConfigError("this engine was shut down; make a new one.")
        return self._core

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, or None if the model directory has none."""
        return self.core.tokenizer

    @property
    def model_config(self) -> DecoderConfig:
        """Shape and settings of the model."""
        return self.core.runner.shape.decoder.cfg

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt plus output, in tokens."""
        return self.core.max_model_len

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, priority: int = 0, use_tqdm: bool | None = None
    ) -> list[RequestOutput]:
        """Generates for one prompt or many; a list comes back, in the order of the prompts.

        Args:
            prompts: text, token ids, ``{"prompt_token_ids": [...]}``, or a list of these.
            sampling_params: one `SamplingParams` (or mapping) for all prompts, or a list with one per prompt.
            priority: smaller runs first.
            use_tqdm: show a progress bar; None shows it on a terminal.

        Raises:
            RequestError, CapacityError: a prompt or its parameters are invalid; nothing was started then.
            KeyboardInterrupt: after Ctrl-C, once the requests of this call are aborted; the engine serves on.
        """
        requests = self._read(prompts, sampling_params)
        ids: list[str] = []
        with self._abort_on_exit(ids), _progress(len(requests), use_tqdm) as advance:
            for prompt, params in requests:
                # Only the final output is returned, so the intermediate ones need not be built.
                final = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
                ids.append(self._add(prompt, final, priority=priority))
            done: dict[str, RequestOutput] = {}
            for output in self._outputs(set(ids)):
                done[output.request_id] = output
                advance(output)
        return [done[request_id] for request_id in ids]

    def stream(
        self, prompt: Any, sampling_params: Any = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Yields what is new in each step for one prompt; closing the iterator aborts the request."""
        requests = self._read(prompt, sampling_params)
        if len(requests) != 1:
            raise RequestError(
                f"stream takes one prompt, {len(requests)} were given: call it once per prompt, or use generate.",
                parameter="prompt",
            )
        ((read, params),) = requests
        request_id = self._add(read, replace(params, output_kind=RequestOutputKind.DELTA), priority=priority)
        return self._stream(request_id)

    def _stream(self, request_id: str) -> Iterator[RequestOutput]:
        with self._abort_on_exit([request_id]):
            yield from self._outputs({request_id})

    def _outputs(self, pending: set[str]) -> Iterator[RequestOutput]:
        """Steps until the requests `pending` have finished; what belongs to others is kept for them."""
        others: list[RequestOutput] = []
        try:
            while pending:
                for output in self.core.step():
                    if output.request_id not in pending:
                        others.append(output)
                        continue
                    if output.finished:
                        pending.discard(output.request_id)
                    yield output
        finally:
            if self._core is not None:
                self._core.put_back(others)

    def chat(
        self,
        messages: list[Any],
        sampling_params: Any = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages) or several (a list of such lists).

        Raises:
            RequestError: the messages do not fit the model's chat template, or there is none.
        """
        prompts = self.chat_prompts(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **(chat_template_kwargs or {}),
        )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompts(self, messages: list[Any], **options: Any) -> list[dict[str, Any]]:
        """Conversations as prompts, for `generate`, `stream` or `add_request`."""
        several = bool(messages) and isinstance(messages[0], (list, tuple))
        return [
            render_chat(self.tokenizer, talk, **options) for talk in (messages if several else [messages])
        ]

    def add_request(
        self, request_id: str, prompt: Any, sampling_params: Any = None, *, priority: int = 0
    ) -> None:
        """Queues one request for `step`.

        Raises:
            RequestError, CapacityError: it is invalid; every other request is unaffected.
        """
        self.core.add(request_id, *self.prepare(prompt, sampling_params), priority)

    def prepare(self, prompt: Any, sampling_params: Any = None) -> tuple[Prompt, SamplingParams]:
        """One request read and checked, and not queued. May run beside `step` on another thread.

        Raises:
            RequestError, CapacityError: what `add_request` would raise.
        """
        (request,) = self._read([prompt], sampling_params)
        return request

    def step(self) -> list[RequestOutput]:
        """Advances every running request; returns the outputs that changed."""
        return self.core.step()

    def abort(self, request_id: str | list[str]) -> list[RequestOutput]:
        """Ends requests in any state; their pages are free at once. Unknown ids are ignored."""
        return self.core.abort([request_id] if isinstance(request_id, str) else request_id)

    def has_unfinished(self) -> bool:
        return self.core.has_unfinished

    def memory(self) -> dict[str, int]:
        """Bytes by component: of the device arrays that exist, and of the pages in each tier below; the parts sum to
        ``total``."""
        core = self.core
        parts = core.runner.memory() | (core.tiers.memory() if core.tiers else {})
        if core.runner.rows_hold:
            parts["conversation_rows"] = core.scheduler.conversations.row_bytes
        return {**parts, "total": sum(parts.values())}

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges since the engine started."""
        return engine_stats(self.core)

    def shutdown(self) -> None:
        """Aborts what runs and gives the device memory back. Calling it twice is fine."""
        if self._core is not None:
            self._core.close()
            self._core = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()

    def _read(self, prompts: Any, sampling_params: Any) -> list[tuple[Prompt, SamplingParams]]:
        """Every prompt with its parameters, all checked, so that a bad one stops the call before it starts."""
        core = self.core
        items = split_prompts(prompts)
        if isinstance(sampling_params, (list, tuple)):
            if len(sampling_params) != len(items):
                raise RequestError(
                    f"{len(sampling_params)} sampling_params for {len(items)} prompts: give one for all or one each.",
                    parameter="sampling_params",
                )
            params = [SamplingParams.coerce(value) for value in sampling_params]
        else:
            params = [SamplingParams.coerce(sampling_params)] * len(items)
        vocab_size = core.runner.vocab_size
        requests = [
            (read_prompt(item, core.tokenizer, vocab_size), p) for item, p in zip(items, params, strict=True)
        ]
        turns = [(p.cache_salt, p.conversation) for p in params if p.conversation is not None]
        if len(set(turns)) < len(turns):
            reject(
                "conversation", turns[0][1], "of one prompt of a call", "One turn of a conversation follows the other."
            )
        requests = [(core.extended(prompt, p), p) for prompt, p in requests]
        for prompt, p in requests:
            core.check(prompt, p)
        return requests

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int) -> str:
        request_id = f"request-{next(self._ids)}"
        self.core.add(request_id, prompt, params, priority)
        return request_id

    @contextlib.contextmanager
    def _abort_on_exit(self, request_ids: list[str]) -> Iterator[None]:
        """Whatever ends the block early (Ctrl-C, an error, a closed iterator), no request stays behind."""
        try:
            yield
        finally:
            if self._core is not None:
                self._core.abort(request_ids)


@contextlib.contextmanager
def _progress(total: int, use_tqdm: bool | None) -> Iterator[Any]:
    if not (sys.stderr.isatty() if use_tqdm is None else use_tqdm):
        yield lambda output: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="generating", unit="prompt") as bar:
        tokens = 0

        def advance(output: RequestOutput) -> None:
            nonlocal tokens
            tokens += sum(len(choice.token_ids) for choice in output.outputs)
            bar.update()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-6):.0f} tokens/s")

        yield advance
