"""What surrounds every call: its id, tokens, statuses for errors, the log line."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sparsejax.errors import RequestError, SparseJaxError
from sparsejax.serve.errors import Overloaded, Unavailable
from sparsejax.serve.grpc.errors import Refused, RpcStatus, as_status
from sparsejax.serve.keys import KeyRing
from sparsejax.serve.refusals import RefusalLog
from sparsejax.serve.service import Service, Status
from sparsejax.serve.traces import span

log = logging.getLogger("sparsejax.access")
OPEN = "/grpc.health.v1.Health/"
FOREIGN = ("/grpc.reflection.", OPEN)
"""Methods with statuses of their own, which are served as they are."""
GENERATING = (
    *(f"/sparsejax.v1.Inference/{method}" for method in ("Generate", "GenerateStream", "Chat", "ChatStream")),
    "/vllm.grpc.engine.VllmEngine/Generate",
)
"""Methods that take room; while there is none, they are refused before their message is received."""
STUBS = "_pb2_grpc"
"""Where methods are that no service of ours has overridden. Their refusal is all that is sent: after the metadata that
other answers begin with, gateways take a stream for one that works, and ask again without end."""


class Access(grpc.aio.ServerInterceptor):
    """Wraps every method.

    Messages are received and read here and not by gRPC, which waits for one as long as it takes, says nothing where
    none comes, and answers one that it cannot read as if that were a bug of the server.

    Args:
        message_timeout: seconds in which the message of a call must have arrived.
    """

    def __init__(self, service: Service, keys: KeyRing, message_timeout: float):
        self._service, self._keys, self._timeout = service, keys, message_timeout
        self._refusals = RefusalLog()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method, metadata = details.method, dict(details.invocation_metadata or ())
        if not method.startswith(OPEN) and self._keys.holder(metadata.get("authorization", "")) is None:
            return grpc.unary_unary_rpc_method_handler(_refuse)
        handler = await continuation(details)
        if handler is None or method.startswith(FOREIGN):
            return handler
        if method in GENERATING:
            try:
                self._service.check_room()
            except (Overloaded, Unavailable) as error:
                self._refusals.add(method)
                return _turned_away(as_status(error))
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        if behaviour.__module__.endswith(STUBS):
            return grpc.unary_unary_rpc_method_handler(_not_offered)
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )

        async def call(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            carried = {key: value for key, value in metadata.items() if isinstance(value, str)}
            with span(method, carried) as note:
                return await self._answer(method, behaviour, handler.request_deserializer, messages, context, note)

        return make(call, None, handler.response_serializer)

    async def _answer(
        self,
        method: str,
        behaviour: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]],
        read: Callable[[bytes], Any],
        messages: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext,
        note: Callable[[dict[str, Any], bool], None],
    ) -> Any:
        given = dict(context.invocation_metadata() or ()).get("x-request-id", "")
        request_id = given if isinstance(given, str) and 0 < len(given) <= 128 else uuid.uuid4().hex
        start, outcome = time.monotonic(), "OK"
        try:
            await context.send_initial_metadata((("x-request-id", request_id),))
            return await behaviour(await self._message(read, messages), context)
        except asyncio.CancelledError:
            outcome = "CANCELLED"  # by the client, or its deadline has passed
            raise
        except SparseJaxError as error:
            status = self._status(error)
            outcome = status.code.name
            await context.abort(status.code, status.details, status.metadata)
        except Exception:
            outcome = "INTERNAL"
            log.exception("bug", extra={"fields": {"request_id": request_id, "method": method}})
            await context.abort(grpc.StatusCode.INTERNAL, "an internal error; the server's log says more.")
        finally:
            fields = {"request_id": request_id, "method": method, "status": outcome}
            fields["ms"] = round(1000 * (time.monotonic() - start), 1)
            log.info("request", extra={"fields": fields})
            note(fields, outcome == "INTERNAL")

    async def _message(self, read: Callable[[bytes], Any], messages: AsyncIterator[bytes]) -> Any:
        """The message of a call.

        Raises:
            RequestError: none came, or it cannot be read. Refused: it came too slowly.
        """
        try:
            async with asyncio.timeout(self._timeout):
                raw = await anext(aiter(messages), None)
        except TimeoutError as error:
            text = f"the message of the call did not arrive within {self._timeout} s."
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, text) from error
        if raw is None:
            raise RequestError("the call ended without a message: send one.")
        try:
            return read(raw)
        except DecodeError as error:
            raise RequestError(f"the message of {len(raw)} bytes cannot be read: {error}.") from error

    def _status(self, error: SparseJaxError) -> RpcStatus:
        status = as_status(error)
        gone = self._service.status in (Status.STOPPED, Status.FAILED)
        if status.code is grpc.StatusCode.INTERNAL and gone:
            return RpcStatus(grpc.StatusCode.UNAVAILABLE, status.details)
        return status


def _turned_away(status: RpcStatus) -> grpc.RpcMethodHandler:
    """A method that answers with a status; it is one of streams, because those receive nothing that nobody reads."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(status.code, status.details, status.metadata)

    return grpc.stream_unary_rpc_method_handler(refuse)


async def _refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
    message = "the token is missing or wrong: send metadata 'authorization: Bearer TOKEN'."
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)


async def _not_offered(request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this method is not offered here.")
