"""How much a service takes on: bounds on accepted requests, checked before any work is done for one."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from sparsejax.errors import RequestError
from sparsejax.serve.checks import above_zero
from sparsejax.serve.errors import Overloaded

LONGEST_WAIT = 60.0
RECENT = 64


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds of a service.

    Attributes:
        max_requests: samples (a request with n counts n times) accepted and not finished, queued or running.
        max_prompt_tokens: prompt tokens of the requests accepted and not finished.
        patience: seconds that a client may leave output unread before its request is aborted.
        stuck_after: seconds that one engine step may take before the service no longer counts as alive.
    """

    max_requests: int = 256
    max_prompt_tokens: int = 4_000_000
    patience: float = 60.0
    stuck_after: float = 300.0

    def __post_init__(self) -> None:
        above_zero(self, "max_requests", "max_prompt_tokens", "patience", "stuck_after")


class Admission:
    """Counts what was accepted. Safe to use from any thread."""

    def __init__(self, limits: ServiceLimits):
        self.limits = limits
        self.requests = 0
        self.prompt_tokens = 0
        self._lock = threading.Lock()
        self._ends: deque[float] = deque(maxlen=RECENT)

    def take(self, samples: int) -> Ticket:
        """Room for one request of `samples` samples.

        Raises:
            Overloaded: there is none now. RequestError: there never is.
        """
        most = self.limits.max_requests
        if samples > most:
            raise RequestError(
                f"{samples} samples were asked for at once; this server takes at most {most}. Ask for fewer.",
                parameter="n",
                value=samples,
            )
        with self._lock:
            self._check("requests", self.requests, samples, most)
            self.requests += samples
        return Ticket(self, samples)

    def check_room(self) -> None:
        """Takes nothing.

        Raises:
            Overloaded: not even the smallest request can be taken now.
        """
        with self._lock:
            self._check("requests", self.requests, 1, self.limits.max_requests)
            self._check("prompt tokens", self.prompt_tokens, 1, self.limits.max_prompt_tokens)

    def _check(self, what: str, held: int, more: int, most: int) -> None:
        if held and held + more > most:
            raise Overloaded(
                f"the server is busy: {held:,} {what} are in its queue, {more:,} more do not fit below {most:,}. "
                "Try again later.",
                self._retry_after(),
            )

    def _retry_after(self) -> float:
        """The time in which the last requests freed room for one more, at the rate of the recent ones."""
        if len(self._ends) < 2:
            return 1.0
        rate = (len(self._ends) - 1) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(max(1.0, 1.0 / rate), LONGEST_WAIT)


class Ticket:
    """The room one request holds until it is released."""

    def __init__(self, admission: Admission, samples: int):
        self._admission, self._samples, self._tokens = admission, samples, 0
        self._released = False

    def add_tokens(self, count: int) -> None:
        """Counts the prompt, once its length is known.

        Raises:
            Overloaded: the prompts that wait are too long together.
        """
        admission = self._admission
        with admission._lock:
            admission._check(
                "prompt tokens", admission.prompt_tokens, count, admission.limits.max_prompt_tokens
            )
            admission.prompt_tokens += count
            self._tokens = count

    def release(self) -> None:
        """Gives the room back; further calls do nothing."""
        admission = self._admission
        with admission._lock:
            if self._released:
                return
            self._released = True
            admission.requests -= self._samples
            admission.prompt_tokens -= self._tokens
            admission._ends.append(time.monotonic())
