"""What a request asks for (SamplingParams) and what comes back (RequestOutput and its parts).

Field names are those of vLLM, so code written for it keeps working. Imports no JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsejax.engine.params import (
    MAX_BIAS_ENTRIES,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    RequestOutputKind,
    SamplingParams,
)

__all__ = [
    "MAX_BIAS_ENTRIES",
    "MAX_LOGPROBS",
    "MAX_STOP_IDS",
    "CompletionOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "token_logprobs",
]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural log, raw logits) of one token; rank 1 is the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def token_logprobs(
    token: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int] = (),
    top_logprobs: Sequence[float] = (),
    decode: Callable[[int], str] | None = None,
) -> dict[int, Logprob]:
    """Entry of one position: the chosen token first, then the alternatives in order, each once."""
    entry = {token: Logprob(float(logprob), int(rank), decode(token) if decode else None)}
    for position, (other, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
        if int(other) >= 0 and int(other) != token:
            entry[int(other)] = Logprob(float(value), position, decode(int(other)) if decode else None)
    return entry


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds of ``time.monotonic``; None until it happens."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's n samples. ``stop_reason`` is the matched text or token id, None for EOS."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """State of one request: cumulative, new parts only or final, as its ``output_kind`` says.

    Attributes:
        conversation: under this name the finished request can be continued, if it asked for `keep_alive`; None where
            nothing was kept: it was aborted, or holds more pages than the engine keeps.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    conversation: str | None = None
