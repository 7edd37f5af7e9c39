"""`/v1/chat/completions`: conversations, tools, rules for the output, log-probabilities, streams."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.serve.openai.body import read_body, request_schema
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.events import EventStream, unless_gone
from sparsejax.serve.openai.fields import SamplingFields
from sparsejax.serve.openai.generation import Call, kept
from sparsejax.serve.openai.logprobs import chat_logprobs
from sparsejax.serve.openai.messages import Message, Tool, template_messages
from sparsejax.serve.openai.tool_parsers import format_for
from sparsejax.serve.openai.tools import Reader, ToolChoice, ToolPlan

router = APIRouter()
WHOLE, CHUNK = "chat.completion", "chat.completion.chunk"


class TemplateFields(SamplingFields):
    """How messages become a prompt."""

    messages: list[Message]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None


class ChatRequest(TemplateFields):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


async def render(state: State, body: TemplateFields, use_tools: bool) -> dict[str, Any]:
    """The prompt of a conversation.

    Raises:
        ApiError, RequestError: the messages do not fit, or the request may not bring its own template.
    """
    if body.chat_template is not None and not state.options.trust_request_chat_template:
        raise ApiError(
            400,
            "requests may not bring a chat_template here; the server's --trust-request-chat-template allows it.",
            param="chat_template",
        )
    # An argument of apply_chat_template itself would change what it returns.
    extra = {
        name: value
        for name, value in (body.chat_template_kwargs or {}).items()
        if name not in ("tokenize", "return_dict", "return_tensors", "conversation", "chat_template")
    }
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if use_tools else []
    own = {
        "tools": tools or None,
        "documents": body.documents,
        "chat_template": body.chat_template or state.chat_template,
        "continue_final_message": body.continue_final_message,
        "add_generation_prompt": not body.continue_final_message
        if body.add_generation_prompt is None
        else body.add_generation_prompt,
    }
    return await state.service.render(template_messages(body.messages), **{**extra, **own})


@router.post("/v1/chat/completions", openapi_extra=request_schema(ChatRequest))
async def chat(request: Request) -> Response:
    """Answers a conversation."""
    body = await read_body(request, ChatRequest)
    call = Call.of(request, body, "chatcmpl")
    answer = Chat(call, body, request.app.state.chat_template)
    prompt = await render(request.app.state, body, answer.use_tools)
    if body.stream:
        streams = await call.submit([prompt], answer.params)
        return EventStream(answer.events(streams), call.options.send_timeout, streams)
    (output,) = await unless_gone(request.receive, call.finals([prompt], answer.params))
    return JSONResponse(answer.whole(output))


class Chat:
    """One chat request: what to ask of the engine and how to answer."""

    def __init__(self, call: Call, body: ChatRequest, chat_template: str | None):
        self.call, self.body = call, body
        self.texts = call.texts()
        tokenizer = call.service.engine.engine.tokenizer
        template = chat_template or getattr(tokenizer, "chat_template", None)
        format_ = format_for(call.options.tool_call_parser, template if isinstance(template, str) else None)
        self.plan = ToolPlan(body.tools, body.tool_choice, format_, body.parallel_tool_calls is not False)
        self.use_tools = body.tool_choice != "none"
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs is only allowed with logprobs=true.", param="top_logprobs")
        self.params = self._params()

    def _params(self) -> SamplingParams:
        body = self.body
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        values: dict[str, Any] = {"max_tokens": limit, "structured_outputs": self.plan.rule(body.rule())}
        if body.logprobs:
            values["logprobs"] = body.top_logprobs or 0
        return body.sampling(**values)

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = []
        for part in output.outputs:
            reader = self.plan.reader()
            delta = reader.feed(part.text, last=True)
            calls = [{**call} for call in delta.get("tool_calls", ())]
            for call in calls:
                del call["index"]
            message = {"role": "assistant", "content": delta.get("content", None if calls else "")}
            if calls:
                message["tool_calls"] = calls
            choices.append({**self._ends(part, reader), "message": message, **kept(output)})
        more = {"prompt_token_ids": output.prompt_token_ids} if self.body.return_token_ids else {}
        if self.body.prompt_logprobs is not None:
            more["prompt_logprobs"] = _prompt_logprobs(output)
        return self.call.frame(WHOLE, choices, usage=self.call.usage.body(), **more)

    async def events(self, streams: list[Stream]) -> AsyncGenerator[dict[str, Any]]:
        wanted = self.body.stream_options
        readers = [self.plan.reader() for _ in range(self.params.n)]
        for index in range(self.params.n):
            delta = {"role": "assistant", "content": ""}
            yield self.call.frame(CHUNK, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        async for _, output in self.call.interleaved(streams):
            for part in output.outputs:
                reader = readers[part.index]
                delta = reader.feed(part.text, last=part.finish_reason is not None)
                choice = {**self._ends(part, reader), "delta": delta, **kept(output)}
                if delta or choice["finish_reason"] or choice["logprobs"] or self.body.return_token_ids:
                    usage = {"usage": self.call.usage.body()} if wanted and wanted.continuous_usage_stats else {}
                    yield self.call.frame(CHUNK, [choice], **usage)
        if wanted and wanted.include_usage:
            yield self.call.frame(CHUNK, [], usage=self.call.usage.body())

    def _ends(self, part: CompletionOutput, reader: Reader) -> dict[str, Any]:
        """What a choice and a piece of one have in common."""
        logprobs = None
        if self.body.logprobs and part.token_ids:
            logprobs = chat_logprobs(self.texts, part.token_ids, part.logprobs or [], self.body.top_logprobs or 0)
        choice: dict[str, Any] = {
            "index": part.index,
            "logprobs": logprobs,
            "finish_reason": reader.finish_reason(part.finish_reason),
            "stop_reason": part.stop_reason,
        }
        return {**choice, "token_ids": part.token_ids} if self.body.return_token_ids else choice


def _prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each token of the prompt its alternatives by token id."""
    return [
        entry
        and {
            str(token): {"logprob": its.logprob, "rank": its.rank, "decoded_token": its.decoded_token}
            for token, its in entry.items()
        }
        for entry in output.prompt_logprobs or ()
    ]
