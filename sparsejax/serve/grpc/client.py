"""`GrpcClient`: the server's calls as Python methods, with the engine's own classes and errors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.request import RequestOutput
from sparsejax.errors import RequestError
from sparsejax.serve.grpc.convert import read_output, write_params
from sparsejax.serve.grpc.errors import as_error
from sparsejax.serve.grpc.protos import control_pb2, control_pb2_grpc
from sparsejax.serve.grpc.protos import inference_pb2 as pb
from sparsejax.serve.grpc.protos.inference_pb2_grpc import InferenceStub

Params = SamplingParams | Mapping[str, Any] | None


class GrpcClient:
    """Talks with one server; safe to use from many threads.

    ```python
    with GrpcClient("localhost:50051") as client:
        print(client.generate("Once upon a time", {"max_tokens": 32}).outputs[0].text)
        for delta in client.stream("Once upon a time", {"max_tokens": 32}):
            print(delta.outputs[0].text, end="", flush=True)
    ```

    Leaving a stream early ends its request. Every method raises RequestError for what the server cannot accept,
    Overloaded and Unavailable for not now, TimeoutError after `timeout` and SparseJaxError for the rest.

    Args:
        target: address of the server, ``host:port``.
        token: API token.
        credentials: of TLS, from ``grpc.ssl_channel_credentials``; None is plain text.
        timeout: seconds that a call may take; None is no limit.
        max_message_bytes: largest message in either direction.
        options: further channel arguments of gRPC.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float | None = None,
        max_message_bytes: int = 64 << 20,
        options: Sequence[tuple[str, Any]] = (),
    ):
        sizes = [(f"grpc.max_{way}_message_length", max_message_bytes) for way in ("send", "receive")]
        arguments = [*sizes, *options]
        if credentials is None:
            self.channel = grpc.insecure_channel(target, arguments)
        else:
            self.channel = grpc.secure_channel(target, credentials, arguments)
        self._inference = InferenceStub(self.channel)
        self._control = control_pb2_grpc.ControlStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._call = {"metadata": (("authorization", f"Bearer {token}"),) if token else (), "timeout": timeout}

    def generate(self, prompt: str | Sequence[int], params: Params = None, **fields: Any) -> RequestOutput:
        """The whole answer. `fields` are further ones of the request, such as ``request_id`` or ``priority``."""
        return read_output(self._send(self._inference.Generate, _request(prompt, params, fields)))

    def stream(self, prompt: str | Sequence[int], params: Params = None, **fields: Any) -> Iterator[RequestOutput]:
        """The answer in pieces, each with what is new."""
        return self._pieces(self._inference.GenerateStream, _request(prompt, params, fields))

    def chat(self, messages: Sequence[Mapping[str, Any]], params: Params = None, **fields: Any) -> RequestOutput:
        """The whole answer to a conversation; `fields` as for `generate`, and those of the chat template."""
        return read_output(self._send(self._inference.Chat, _conversation(messages, params, fields)))

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], params: Params = None, **fields: Any
    ) -> Iterator[RequestOutput]:
        """The answer to a conversation in pieces."""
        return self._pieces(self._inference.ChatStream, _conversation(messages, params, fields))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._send(self._inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._send(self._inference.Detokenize, _filled(pb.DetokenizeRequest, token_ids=token_ids)).text

    def abort(self, *request_ids: str) -> None:
        """Ends requests; their answers end with finish reason ``"abort"``."""
        self._send(self._inference.Abort, pb.AbortRequest(request_ids=request_ids))

    def model_info(self) -> control_pb2.GetModelInfoResponse:
        return self._send(self._control.GetModelInfo, control_pb2.GetModelInfoRequest())

    def server_info(self) -> control_pb2.GetServerInfoResponse:
        return self._send(self._control.GetServerInfo, control_pb2.GetServerInfoRequest())

    def memory(self) -> dict[str, int]:
        """Allocated bytes by component, as `Engine.memory`."""
        return dict(self._send(self._control.GetMemory, control_pb2.GetMemoryRequest()).bytes)

    def stats(self) -> dict[str, float]:
        """Counters and gauges, as `Engine.stats`."""
        return dict(self._send(self._control.GetStats, control_pb2.GetStatsRequest()).values)

    def ready(self, service: str = "") -> bool:
        """Whether the server takes requests."""
        answer = self._send(self._health.Check, health_pb2.HealthCheckRequest(service=service))
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, method: Any, request: Any) -> Any:
        with _our_errors():
            return method(request, **self._call)

    def _pieces(self, method: Any, request: Any) -> Iterator[RequestOutput]:
        with _our_errors():
            call = method(request, **self._call)
            try:
                for message in call:
                    yield read_output(message)
            finally:
                call.cancel()


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise as_error(error) from error


def _filled(message: Any, **fields: Any) -> Any:
    """A message of these fields.

    Raises:
        RequestError: there is no such field, or it cannot hold the value.
    """
    try:
        return message(**fields)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the fields {', '.join(fields)} do not fit the request: {error}.") from error


def _request(prompt: str | Sequence[int], params: Params, fields: Mapping[str, Any]) -> pb.GenerateRequest:
    given = {"text": prompt} if isinstance(prompt, str) else {"token_ids": _filled(pb.TokenIds, ids=prompt)}
    return _filled(pb.GenerateRequest, sampling=write_params(params), **given, **fields)


def _conversation(
    messages: Sequence[Mapping[str, Any]], params: Params, fields: Mapping[str, Any]
) -> pb.ChatRequest:
    read = [_filled(pb.ChatMessage, **{name: _text(value) for name, value in one.items()}) for one in messages]
    texts = {name: _text(value) if name in ("tools", "template_options") else value for name, value in fields.items()}
    return _filled(pb.ChatRequest, messages=read, sampling=write_params(params), **texts)


def _text(value: Any) -> str | None:
    """Lists and mappings travel as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value)
