"""Why a service takes no request right now. Invalid requests raise RequestError and CapacityError, as everywhere."""

from __future__ import annotations

from sparsejax.errors import SparseJaxError


class Unavailable(SparseJaxError):
    """The service is loading, draining, stopped or has failed: HTTP 503, gRPC UNAVAILABLE.

    Attributes:
        retry_after: seconds after which asking again makes sense.
    """

    retry_after = 5.0


class Overloaded(SparseJaxError):
    """The queue is full: HTTP 503 with Retry-After, gRPC RESOURCE_EXHAUSTED.

    Attributes:
        retry_after: seconds after which there is probably room, at least 1.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after
