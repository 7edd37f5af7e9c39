"""`sparsejax.v1.Inference`: generation, conversations, tokens and aborts over a `Service`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from sparsejax.engine.params import RequestOutputKind, SamplingParams
from sparsejax.engine.request import RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.errors import RequestError
from sparsejax.serve.grpc.convert import read_params, write_logprobs, write_output
from sparsejax.serve.grpc.errors import Refused, read_json
from sparsejax.serve.grpc.protos import inference_pb2 as pb
from sparsejax.serve.grpc.protos.inference_pb2_grpc import InferenceServicer
from sparsejax.serve.service import Service

LONGEST_ID = 256
TEMPLATE_RESERVED = ("tokenize", "return_dict", "return_tensors", "conversation", "chat_template")
Context = grpc.aio.ServicerContext


class Inference(InferenceServicer):
    """Cancelling a call, or its deadline, ends the request at once: leaving the stream's block aborts it."""

    def __init__(self, service: Service, names: tuple[str, ...]):
        self._service, self._names = service, names

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        return await self._whole(request, await self._prompt(request), 16)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        await self._pieces(request, await self._prompt(request), 16, context.write)

    async def Chat(self, request: pb.ChatRequest, context: Context) -> pb.GenerateResponse:
        return await self._whole(request, await self._conversation(request), None)

    async def ChatStream(self, request: pb.ChatRequest, context: Context) -> None:
        await self._pieces(request, await self._conversation(request), None, context.write)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        self._check_model(request)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        return pb.TokenizeResponse(token_ids=await self._service.tokenize(request.text, special))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        self._check_model(request)
        return pb.DetokenizeResponse(text=await self._service.detokenize(list(request.token_ids)))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        await self._service.abort(list(request.request_ids))
        return pb.AbortResponse()

    async def _whole(self, request: Any, prompt: Any, max_tokens: int | None) -> pb.GenerateResponse:
        params = read_params(request.sampling, RequestOutputKind.FINAL_ONLY, max_tokens=max_tokens)
        async with await self._submit(request, prompt, params) as stream:
            output = await stream.final()
        counted = sum(len(part.token_ids) for part in output.outputs)
        return write_output(output, prompt=_prompt_info(request, stream, output), usage=_usage(stream, output, counted))

    async def _pieces(
        self, request: Any, prompt: Any, max_tokens: int | None, write: Callable[[Any], Awaitable[None]]
    ) -> None:
        params = read_params(request.sampling, RequestOutputKind.DELTA, max_tokens=max_tokens)
        counted, is_first = 0, True
        async with await self._submit(request, prompt, params) as stream:
            async for output in stream:
                counted += sum(len(part.token_ids) for part in output.outputs)
                more = {"prompt": _prompt_info(request, stream, output)} if is_first else {}
                if output.finished:
                    more["usage"] = _usage(stream, output, counted)
                is_first = False
                await write(write_output(output, **more))

    async def _submit(self, request: Any, prompt: Any, params: SamplingParams) -> Stream:
        request_id = request.request_id if request.HasField("request_id") else None
        if request_id is not None and not 0 < len(request_id) <= LONGEST_ID:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"request_id has {len(request_id)} characters; give 1 to {LONGEST_ID}, or leave it out.",
            )
        return await self._service.submit(prompt, params, request_id=request_id, priority=request.priority)

    async def _prompt(self, request: pb.GenerateRequest) -> Any:
        self._check_model(request)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise RequestError("the request has no prompt: set text or token_ids.", parameter="prompt")
        compress_at = request.compress_at if request.HasField("compress_at") else None
        if kind == "text":
            return {"prompt": request.text, "compress_at": compress_at}
        return {"prompt_token_ids": list(request.token_ids.ids), "compress_at": compress_at}

    async def _conversation(self, request: pb.ChatRequest) -> dict[str, Any]:
        self._check_model(request)
        options: dict[str, Any] = {}
        if request.HasField("template_options"):
            extra = read_json("template_options", request.template_options, dict, "a JSON object")
            options |= {name: value for name, value in extra.items() if name not in TEMPLATE_RESERVED}
        if request.HasField("tools"):
            options["tools"] = read_json("tools", request.tools, list, "a JSON list of tools") or None
        goes_on = request.continue_final_message
        options["continue_final_message"] = goes_on
        has_own = request.HasField("add_generation_prompt")
        options["add_generation_prompt"] = request.add_generation_prompt if has_own else not goes_on
        return await self._service.render([_message(one) for one in request.messages], **options)

    def _check_model(self, request: Any) -> None:
        name = request.model if request.HasField("model") else ""
        if name and name not in self._names:
            known = ", ".join(map(repr, self._names))
            raise Refused(
                grpc.StatusCode.NOT_FOUND, f"there is no model {name[:200]!r} here; this server has {known}."
            )


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    fields = ("content", "name", "tool_call_id")
    read = {"role": message.role} | {name: getattr(message, name) for name in fields if message.HasField(name)}
    if message.HasField("tool_calls"):
        read["tool_calls"] = read_json("tool_calls", message.tool_calls, list, "a JSON list of calls")
    return {"content": "", **read}


def _prompt_info(request: Any, stream: Stream, output: RequestOutput) -> pb.PromptInfo | None:
    if not request.return_prompt and output.prompt_logprobs is None:
        return None
    ids = stream.prompt_token_ids if request.return_prompt else ()
    return pb.PromptInfo(token_ids=ids, logprobs=write_logprobs(output.prompt_logprobs or ()))


def _usage(stream: Stream, output: RequestOutput, completion_tokens: int) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=len(stream.prompt_token_ids),
        completion_tokens=completion_tokens,
        cached_tokens=output.num_cached_tokens or 0,
    )
