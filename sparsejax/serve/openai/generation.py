"""From a validated request to the streams that answer it; what completions, chat and responses share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.request import RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.errors import RequestError
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.fields import SamplingFields
from sparsejax.serve.openai.logprobs import TokenTexts
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.service import Service


@dataclass
class Usage:
    """Tokens of one HTTP request, all its prompts and samples together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def count(self, output: RequestOutput) -> None:
        """Adds the output tokens of a delta or of a final output."""
        self.completion_tokens += sum(len(part.token_ids) for part in output.outputs)
        if output.finished:
            self.cached_tokens += output.num_cached_tokens or 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def kept(output: RequestOutput) -> dict[str, str]:
    """The name under which the next request can continue, where it is kept."""
    return {} if output.conversation is None else {"conversation": output.conversation}


@dataclass
class Call:
    """One generating HTTP request: its names, its settings and what it used.

    Attributes:
        id: what the answer is called, such as ``chatcmpl-1f0c62aa-17``.
        model: the name of the model as the client gave it.
        created: seconds since 1970.
        record: fields of the request's line in the log.
    """

    service: Service
    options: HttpOptions
    id: str
    model: str
    created: int
    priority: int
    record: dict[str, Any]
    usage: Usage = field(default_factory=Usage)

    @classmethod
    def of(cls, request: Request, body: SamplingFields, kind: str) -> Call:
        """Checks the model's name.

        Raises:
            ApiError: 404, this server has no such model.
        """
        state = request.app.state
        own = body.request_id or ""
        if len(own) > 256:
            raise ApiError(400, "request_id is longer than 256 characters.", param="request_id")
        call_id = f"{kind}-{own}" if own else state.service.new_id(kind)
        record = request.state.record
        record["call"] = call_id
        return cls(
            state.service,
            state.options,
            call_id,
            state.names.check(body.model),
            int(time.time()),
            body.priority,
            record,
        )

    def texts(self) -> TokenTexts:
        return TokenTexts(self.service.engine.engine.tokenizer)

    def frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or a piece of one."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    async def submit(self, prompts: Sequence[Any], params: SamplingParams) -> list[Stream]:
        """One stream per prompt, in their order; all are accepted or none.

        Raises:
            SparseJaxError: as for `Service.submit`.
        """
        most = self.service.limits.max_requests
        if len(prompts) > 1 and len(prompts) * params.n > most:
            raise RequestError(
                f"{len(prompts)} prompts with n={params.n} are {len(prompts) * params.n} samples; this server takes "
                f"at most {most} at once. Send several requests.",
                parameter="prompt",
            )
        async with contextlib.AsyncExitStack() as stack:
            streams = []
            for index, prompt in enumerate(prompts):
                request_id = self.id if len(prompts) == 1 else f"{self.id}-{index}"
                stream = await self.service.submit(prompt, params, request_id=request_id, priority=self.priority)
                streams.append(await stack.enter_async_context(stream))
            stack.pop_all()
        self.usage.prompt_tokens = sum(len(stream.prompt_token_ids) for stream in streams)
        return streams

    async def finals(self, prompts: Sequence[Any], params: SamplingParams) -> list[RequestOutput]:
        """The final output of every prompt. Cancelling this aborts them."""
        streams = await self.submit(prompts, params)
        try:
            outputs = list(await asyncio.gather(*(stream.final() for stream in streams)))
        finally:
            for stream in streams:
                stream.close()
        for output in outputs:
            self.finish(output)
        return outputs

    async def interleaved(self, streams: list[Stream]) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Deltas of all streams as they come, each with the index of its prompt."""
        if len(streams) == 1:
            outputs: AsyncIterator[tuple[int, RequestOutput]] = _numbered(0, streams[0])
        else:
            outputs = _merged(streams)
        async for index, output in outputs:
            self.finish(output)
            yield index, output

    def finish(self, output: RequestOutput) -> None:
        """Counts an output, and notes in the log's record how its request ended."""
        self.usage.count(output)
        if not output.finished:
            return
        self.record["prompt_tokens"] = self.usage.prompt_tokens
        self.record["completion_tokens"] = self.usage.completion_tokens
        self.record["finish"] = sorted({part.finish_reason or "" for part in output.outputs})
        times = output.metrics
        if times is not None and times.first_token_time is not None:
            self.record["first_token_ms"] = round(1000 * (times.first_token_time - times.arrival_time), 1)


async def _numbered(index: int, stream: Stream) -> AsyncIterator[tuple[int, RequestOutput]]:
    async for output in stream:
        yield index, output


async def _merged(streams: list[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Every stream's outputs in the order in which they are ready; at most one of each is held here."""
    waiting = {asyncio.ensure_future(anext(stream, None)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, output = waiting.pop(task), task.result()
                if output is not None:
                    waiting[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield index, output
    finally:
        for task in waiting:
            task.cancel()
