"""Between messages and the engine's own classes, in both directions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sparsejax.engine.params import RequestOutputKind, SamplingParams
from sparsejax.engine.request import CompletionOutput, Logprob, RequestOutput
from sparsejax.errors import RequestError
from sparsejax.serve.grpc.errors import read_json
from sparsejax.serve.grpc.protos import inference_pb2 as pb

REPEATED = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")
SPECIAL = {*REPEATED, "max_tokens", "logit_bias", "structured_outputs", "sparsity", "output_kind"}
REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "error": pb.FINISH_REASON_ERROR,
}
NAMES = {number: name for name, number in REASONS.items()}


def read_params(message: pb.SamplingParams, kind: RequestOutputKind, **defaults: Any) -> SamplingParams:
    """What a client asks for; `defaults` are for fields that it does not set.

    Raises:
        RequestError: a value is out of range.
    """
    scalars = [f.name for f in pb.SamplingParams.DESCRIPTOR.fields if f.name not in SPECIAL]
    values = {name: getattr(message, name) for name in scalars if message.HasField(name)}
    values |= {name: list(getattr(message, name)) for name in REPEATED if getattr(message, name)}
    if message.HasField("max_tokens"):
        values["max_tokens"] = None if message.max_tokens == -1 else message.max_tokens
    if message.logit_bias:
        values["logit_bias"] = dict(message.logit_bias)
    if message.HasField("structured_outputs"):
        values["structured_outputs"] = _read_rule(message.structured_outputs)
    if message.HasField("sparsity"):
        text = message.sparsity
        is_mapping = text.lstrip().startswith("{")
        values["sparsity"] = read_json("sparsity", text, dict, "a JSON object") if is_mapping else text
    return SamplingParams.from_dict({**defaults, **values, "output_kind": kind})


def _read_rule(message: pb.StructuredOutputs) -> dict[str, Any]:
    kind = message.WhichOneof("rule")
    if kind is None:
        raise RequestError(
            "structured_outputs is empty; set one of json, regex, choice, grammar and json_object.",
            parameter="structured_outputs",
        )
    return {kind: list(message.choice.texts) if kind == "choice" else getattr(message, kind)}


def write_params(params: SamplingParams | Mapping[str, Any] | None) -> pb.SamplingParams:
    """The message for parameters; what has its default is left out. A mapping is passed on as it is given.

    Raises:
        RequestError: a field is unknown, or of a type that no message can hold.
    """
    if isinstance(params, SamplingParams):
        fields = dataclasses.fields(params)
        given = {f.name: v for f in fields if (v := getattr(params, f.name)) != f.default and f.name != "output_kind"}
    else:
        given = dict(params or {})
    message = pb.SamplingParams()
    for name, value in given.items():
        try:
            _write_field(message, name, value)
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{name}={value!r} does not fit the message: {error}.", parameter=name, value=value
            ) from error
    return message


def _write_field(message: pb.SamplingParams, name: str, value: Any) -> None:
    if name == "max_tokens":
        message.max_tokens = -1 if value is None else value
    elif value is None:
        return
    elif name == "logit_bias":
        message.logit_bias.update({int(token): bias for token, bias in value.items()})
    elif name == "sparsity":
        message.sparsity = value if isinstance(value, str) else json.dumps(value)
    elif name == "structured_outputs":
        _write_rule(message.structured_outputs, value)
    elif name in REPEATED:
        getattr(message, name).extend([value] if isinstance(value, str) else value)
    else:
        setattr(message, name, value)


def _write_rule(message: pb.StructuredOutputs, value: Any) -> None:
    rule = value if isinstance(value, Mapping) else dataclasses.asdict(value)
    for kind, content in rule.items():
        if content is None:
            continue
        if kind == "choice":
            message.choice.texts.extend(content)
        else:
            setattr(message, kind, json.dumps(content) if isinstance(content, Mapping) else content)


def write_output(output: RequestOutput, **more: Any) -> pb.GenerateResponse:
    """An output of the engine as a message; `more` are further fields of it."""
    return pb.GenerateResponse(
        request_id=output.request_id,
        outputs=[_write_completion(part) for part in output.outputs],
        finished=output.finished,
        **more,
    )


def _write_completion(part: CompletionOutput) -> pb.SequenceOutput:
    message = pb.SequenceOutput(
        index=part.index,
        text=part.text,
        token_ids=part.token_ids,
        logprobs=write_logprobs(part.logprobs or ()),
        cumulative_logprob=part.cumulative_logprob,
        finish_reason=REASONS.get(part.finish_reason, pb.FINISH_REASON_UNSPECIFIED),
    )
    if isinstance(part.stop_reason, str):
        message.stop_text = part.stop_reason
    elif part.stop_reason is not None:
        message.stop_token_id = part.stop_reason
    return message


def write_logprobs(positions: Iterable[dict[int, Logprob] | None]) -> list[pb.PositionLogprobs]:
    return [
        pb.PositionLogprobs(
            tokens=[
                pb.TokenLogprob(token_id=token, logprob=one.logprob, rank=one.rank, text=one.decoded_token)
                for token, one in (position or {}).items()
            ]
        )
        for position in positions
    ]


def read_output(message: pb.GenerateResponse) -> RequestOutput:
    """The output that a message stands for."""
    prompt = message.prompt if message.HasField("prompt") else None
    return RequestOutput(
        message.request_id,
        None,
        list(prompt.token_ids) if prompt else None,
        _read_logprobs(prompt.logprobs) or None if prompt else None,
        [_read_completion(part) for part in message.outputs],
        message.finished,
        num_cached_tokens=message.usage.cached_tokens if message.HasField("usage") else None,
    )


def _read_completion(part: pb.SequenceOutput) -> CompletionOutput:
    stop = part.WhichOneof("stop_reason")
    return CompletionOutput(
        part.index,
        part.text,
        list(part.token_ids),
        part.cumulative_logprob if part.HasField("cumulative_logprob") else None,
        _read_logprobs(part.logprobs) or None,
        NAMES.get(part.finish_reason),
        getattr(part, stop) if stop else None,
    )


def _read_logprobs(positions: Iterable[pb.PositionLogprobs]) -> list[dict[int, Logprob] | None]:
    return [
        {
            one.token_id: Logprob(
                one.logprob, one.rank if one.HasField("rank") else None, one.text if one.HasField("text") else None
            )
            for one in position.tokens
        }
        or None
        for position in positions
    ]
