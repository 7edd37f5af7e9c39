"""`vllm.grpc.engine.VllmEngine` over a `Service`, for gateways that speak to vLLM; through its published stubs.

Tokens go in and out; the gateway has its own tokenizer, templates and parsers. Scalars of that format that cannot
say whether they were set count as not set when they are zero.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as stubs

import sparsejax
from sparsejax.engine.params import RequestOutputKind, SamplingParams
from sparsejax.engine.request import CompletionOutput, Logprob
from sparsejax.engine.stream import Stream
from sparsejax.errors import RequestError
from sparsejax.serve.service import Service, Status

PLAIN = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens", "n")
OPTIONAL = ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed")
RULES = {"json_schema": "json", "regex": "regex", "grammar": "grammar", "json_object": "json_object"}
Context = grpc.aio.ServicerContext


def add_vllm(server: grpc.aio.Server, service: Service, names: tuple[str, ...]) -> None:
    """Adds the service to a server."""
    stubs.add_VllmEngineServicer_to_server(VllmEngine(service, names), server)


class VllmEngine(stubs.VllmEngineServicer):
    """What is not overridden here is answered with UNIMPLEMENTED."""

    def __init__(self, service: Service, names: tuple[str, ...]):
        self._service, self._names = service, names

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        params = read_params(request.sampling_params, kind)
        request_id = request.request_id or None
        async with await self._service.submit(_prompt(request), params, request_id=request_id) as stream:
            written: dict[int, list[int]] = {}
            async for output in stream:
                for part in output.outputs:
                    tokens = written.setdefault(part.index, [])
                    tokens += part.token_ids
                    if request.stream and part.token_ids:
                        await context.write(pb.GenerateResponse(chunk=_chunk(stream, part, len(tokens))))
                    if part.finish_reason is not None:
                        cached = output.num_cached_tokens or 0
                        complete = _complete(stream, part, tokens, cached, output.prompt_logprobs)
                        await context.write(pb.GenerateResponse(complete=complete))

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        status = self._service.status
        return pb.HealthCheckResponse(healthy=status is Status.READY and self._service.alive, message=status.value)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        await self._service.abort(list(request.request_ids))
        return pb.AbortResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        engine, source = self._service.engine.engine, self._service.config.model or ""
        config = engine.model_config
        return pb.GetModelInfoResponse(
            model_path=source,
            is_generation=True,
            max_context_length=engine.max_model_len,
            vocab_size=config.vocab_size,
            served_model_name=self._names[0],
            tokenizer_path=self._service.config.tokenizer or source,
            model_type=config.family,
            eos_token_ids=config.eos_token_ids,
            max_req_input_len=engine.max_model_len - 1,
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        config = self._service.config
        return pb.GetServerInfoResponse(
            active_requests=self._service.admission.requests,
            uptime_seconds=time.time() - self._service.created,
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        stats, page = self._service.engine.stats(), self._service.config.page_size
        live, free = int(stats["kv_live_pages"]), int(stats["kv_free_pages"])
        running, waiting = int(stats["num_running"]), int(stats["num_waiting"])
        load = pb.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_total_reqs=running + waiting,
            num_used_tokens=live * page,
            max_total_num_tokens=(live + free) * page,
            token_usage=live / max(live + free, 1),
            max_running_requests=self._service.config.max_num_seqs,
        )
        now = datetime.datetime.now(datetime.UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=sparsejax.__version__, dp_rank_count=1, loads=[load])


def _prompt(request: pb.GenerateRequest) -> Any:
    if request.HasField("mm_inputs") or request.HasField("media_refs") or request.extra_mm_inputs:
        raise RequestError("images, sound and video are not read here: send text or token ids.", parameter="mm_inputs")
    if request.WhichOneof("input") is None:
        raise RequestError("the request has no prompt: set tokenized or text.", parameter="input")
    if request.sampling_params.HasField("truncate_prompt_tokens"):
        raise RequestError(
            "truncate_prompt_tokens is not offered: send the tokens that shall be read.",
            parameter="truncate_prompt_tokens",
        )
    return request.text if request.WhichOneof("input") == "text" else list(request.tokenized.input_ids)


def read_params(message: pb.SamplingParams, kind: RequestOutputKind) -> SamplingParams:
    """What a gateway asks for.

    Raises:
        RequestError: a value is out of range, or a rule is not offered.
    """
    values: dict[str, Any] = {name: getattr(message, name) for name in PLAIN if getattr(message, name)}
    values["max_tokens"] = None
    values |= {name: getattr(message, name) for name in OPTIONAL if message.HasField(name)}
    values |= {name: getattr(message, name) for name in ("ignore_eos", "include_stop_str_in_output")}
    values |= {name: list(getattr(message, name)) for name in ("stop", "stop_token_ids") if getattr(message, name)}
    if message.logit_bias:
        values["logit_bias"] = dict(message.logit_bias)
    rule = message.WhichOneof("constraint")
    if rule == "choice":
        values["structured_outputs"] = {"choice": list(message.choice.choices)}
    elif rule in RULES:
        values["structured_outputs"] = {RULES[rule]: getattr(message, rule)}
    elif rule is not None:
        raise RequestError(f"{rule} is not offered; use {', '.join(RULES)} or choice.", parameter=rule)
    # Text is made only where a stop string must be found in it.
    return SamplingParams.from_dict({**values, "detokenize": bool(message.stop), "output_kind": kind})


def _chunk(stream: Stream, part: CompletionOutput, written: int) -> pb.GenerateStreamChunk:
    return pb.GenerateStreamChunk(
        token_ids=part.token_ids,
        prompt_tokens=len(stream.prompt_token_ids),
        completion_tokens=written,
        output_logprobs=_logprobs(part),
        index=part.index,
    )


def _complete(
    stream: Stream, part: CompletionOutput, tokens: list[int], cached: int, prompt_logprobs: list[Any] | None
) -> pb.GenerateComplete:
    message = pb.GenerateComplete(
        output_ids=tokens,
        finish_reason=part.finish_reason,
        prompt_tokens=len(stream.prompt_token_ids),
        completion_tokens=len(tokens),
        cached_tokens=cached,
        output_logprobs=_logprobs(part),
        index=part.index,
    )
    if isinstance(part.stop_reason, str):
        message.matched_stop_str = part.stop_reason
    elif part.stop_reason is not None:
        message.matched_token_id = part.stop_reason
    if prompt_logprobs is not None:
        read = zip(stream.prompt_token_ids, prompt_logprobs, strict=True)
        for token, entry in read:
            message.input_logprobs.token_ids.append(token)
            value = None if entry is None else entry[token].logprob
            message.input_logprobs.token_logprobs.add(**({} if value is None else {"value": value}))
            message.input_logprobs.top_logprobs.append(_top(entry or {}))
    return message


def _logprobs(part: CompletionOutput) -> pb.OutputLogProbs | None:
    if part.logprobs is None:
        return None
    message = pb.OutputLogProbs(token_ids=part.token_ids)
    for token, entry in zip(part.token_ids, part.logprobs, strict=True):
        message.token_logprobs.append(entry[token].logprob)
        message.top_logprobs.append(_top(entry))
    return message


def _top(entry: dict[int, Logprob]) -> pb.TopLogProbs:
    ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)
    return pb.TopLogProbs(values=[one.logprob for _, one in ranked], token_ids=[token for token, _ in ranked])
