"""Errors of ours as gRPC statuses, and statuses as errors of ours.

What programs look at travels as trailing metadata: ``sparsejax-field`` names the wrong field, ``retry-after`` holds
seconds and ``grpc-retry-pushback-ms`` the same for clients that retry by themselves.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import grpc

from sparsejax.errors import CapacityError, RequestError, SparseJaxError
from sparsejax.serve.errors import Overloaded, Unavailable

FIELD, RETRY_AFTER, PUSHBACK = "sparsejax-field", "retry-after", "grpc-retry-pushback-ms"
LONGEST_DETAILS = 2000


class Refused(SparseJaxError):
    """A call that ends with a status which no other error of ours has."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class RpcStatus:
    """How a call ends that failed."""

    code: grpc.StatusCode
    details: str
    metadata: tuple[tuple[str, str], ...] = ()


def as_status(error: SparseJaxError) -> RpcStatus:
    """The status for an error of ours."""
    # Text that a client sent may hold what UTF-8 cannot; the answer must be sendable all the same.
    details = str(error).encode("utf-8", "backslashreplace").decode()[:LONGEST_DETAILS]
    if isinstance(error, Refused):
        return RpcStatus(error.code, details)
    if isinstance(error, RequestError):
        in_use = error.parameter == "request_id"
        code = grpc.StatusCode.ALREADY_EXISTS if in_use else grpc.StatusCode.INVALID_ARGUMENT
        return RpcStatus(code, details, ((FIELD, error.parameter),) if error.parameter else ())
    if isinstance(error, CapacityError):
        return RpcStatus(grpc.StatusCode.INVALID_ARGUMENT, details, ((FIELD, "prompt"),))
    if isinstance(error, Overloaded):
        return RpcStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, details, _retry(error.retry_after))
    if isinstance(error, Unavailable):
        return RpcStatus(grpc.StatusCode.UNAVAILABLE, details, _retry(error.retry_after))
    return RpcStatus(grpc.StatusCode.INTERNAL, details)


def _retry(seconds: float) -> tuple[tuple[str, str], ...]:
    return (RETRY_AFTER, str(math.ceil(seconds))), (PUSHBACK, str(math.ceil(1000 * seconds)))


def as_error(error: grpc.RpcError) -> SparseJaxError | TimeoutError:
    """The error that a call's status stands for; what has no error of its own is a SparseJaxError with the code."""
    code, details = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.NOT_FOUND):
        return RequestError(details, parameter=metadata.get(FIELD))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details, float(metadata.get(RETRY_AFTER, 1.0)))
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(details)
    return SparseJaxError(f"{code.name}: {details}")


def read_json(name: str, text: str, kind: type, shape: str) -> object:
    """A field that holds JSON.

    Raises:
        RequestError: it does not, or holds something else than a `kind`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON ({error}); give {shape}.", parameter=name, value=text) from error
    if not isinstance(value, kind):
        raise RequestError(f"{name} is JSON of another kind; give {shape}.", parameter=name, value=value)
    return value
