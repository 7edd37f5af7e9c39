"""`/v1/completions`: text, several prompts, token ids, echo, log-probabilities, streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.serve.openai.body import read_body, request_schema
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.events import EventStream, unless_gone
from sparsejax.serve.openai.fields import SamplingFields
from sparsejax.serve.openai.generation import Call, kept
from sparsejax.serve.openai.logprobs import completion_logprobs

router = APIRouter()
KIND = "text_completion"


class CompletionRequest(SamplingFields):
    prompt: str | list[int] | list[str] | list[list[int]]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


@router.post("/v1/completions", openapi_extra=request_schema(CompletionRequest))
async def complete(request: Request) -> Response:
    """Continues one prompt or several."""
    body = await read_body(request, CompletionRequest)
    call = Call.of(request, body, "cmpl")
    answer = Completion(call, body)
    if body.stream:
        streams = await call.submit(answer.prompts, answer.params)
        return EventStream(answer.events(streams), call.options.send_timeout, streams)
    outputs = await unless_gone(request.receive, call.finals(answer.prompts, answer.params))
    return JSONResponse(answer.whole(outputs))


class Completion:
    """One completion request: what to ask of the engine and how to answer."""

    def __init__(self, call: Call, body: CompletionRequest):
        self.call, self.body = call, body
        if body.suffix:
            raise ApiError(400, "suffix is not supported: this server continues text only.", param="suffix")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of is not supported: ask for n samples and choose.", param="best_of")
        several = isinstance(body.prompt, list) and (not body.prompt or not isinstance(body.prompt[0], int))
        self.prompts: list[Any] = body.prompt if several else [body.prompt]
        if not self.prompts:
            raise ApiError(400, "prompt is an empty list: give at least one.", param="prompt")
        self.echo = bool(body.echo)
        # Scoring a prompt needs no new token, but the engine makes at least one: it is dropped.
        self.score_only = self.echo and body.max_tokens == 0
        self.params = self._params()
        self.texts = call.texts()

    def _params(self) -> SamplingParams:
        values: dict[str, Any] = {"logprobs": self.body.logprobs}
        if self.score_only:
            values["max_tokens"] = 1
        if self.echo and self.body.logprobs is not None:
            values["prompt_logprobs"] = self.body.logprobs
        return self.body.sampling(**values)

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        if self.score_only:
            self.call.usage.completion_tokens = 0
        choices = [
            self.choice(index, output, part, whole=True)
            for index, output in enumerate(outputs)
            for part in output.outputs
        ]
        return self.call.frame(KIND, choices, usage=self.call.usage.body())

    async def events(self, streams: list[Stream]) -> AsyncGenerator[dict[str, Any]]:
        wanted = self.body.stream_options
        begun: dict[int, int] = {}  # characters of the tokens reported, by choice
        async for index, output in self.call.interleaved(streams):
            for part in output.outputs:
                place = index * self.params.n + part.index
                choice = self.choice(index, output, part, whole=place not in begun, offset=begun.get(place, 0))
                reported = choice["logprobs"]["tokens"] if choice["logprobs"] else ()
                begun[place] = begun.get(place, 0) + sum(map(len, reported))
                usage = {"usage": self.call.usage.body()} if wanted and wanted.continuous_usage_stats else {}
                yield self.call.frame(KIND, [choice], **usage)
        if self.score_only:
            self.call.usage.completion_tokens = 0
        if wanted and wanted.include_usage:
            yield self.call.frame(KIND, [], usage=self.call.usage.body())

    def choice(
        self, index: int, output: RequestOutput, part: CompletionOutput, *, whole: bool, offset: int = 0
    ) -> dict[str, Any]:
        """One choice, or a piece of it. `whole` means that it starts here, with the prompt if that is echoed."""
        text, tokens, entries = part.text, part.token_ids, part.logprobs
        if self.score_only:
            text, tokens, entries = "", [], []
        if self.echo and whole:
            text = self._prompt_text(output) + text
            if self.body.logprobs is not None:
                tokens = output.prompt_token_ids + tokens
                entries = [*(output.prompt_logprobs or []), *(entries or [])]
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(self.texts, tokens, entries or [], self.body.logprobs, offset)
        choice: dict[str, Any] = {
            "index": index * self.params.n + part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
            **kept(output),
        }
        if self.body.return_token_ids:
            choice["token_ids"] = part.token_ids
            if whole:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self.texts.decode(output.prompt_token_ids)
