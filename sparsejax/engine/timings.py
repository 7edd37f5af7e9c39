"""How long requests waited, in buckets: what `/metrics` shows and what percentiles are read from."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsejax.engine.request import RequestMetrics

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKENS = tuple(float(2**power) for power in range(21))


@dataclass
class Buckets:
    """A histogram: `counts[i]` values are at most `bounds[i]` and above the bound before; the last is the rest."""

    bounds: Sequence[float] = SECONDS
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass
class Timings:
    """Histograms over the requests of one engine, in seconds or tokens.

    Attributes:
        first_token: arrival to first token. inter_token: between tokens of one output.
        queue: arrival to the first step. prefill: first step to first token. decode: first token to the end.
        inference: first step to the end. total: arrival to the end.
        per_token: decode time over output tokens after the first, one value per request.
        prompt_tokens, generation_tokens: sizes of finished requests. step_tokens: tokens computed by a step.
        finished: outputs that ended, by reason.
    """

    first_token: Buckets = field(default_factory=Buckets)
    inter_token: Buckets = field(default_factory=Buckets)
    queue: Buckets = field(default_factory=Buckets)
    prefill: Buckets = field(default_factory=Buckets)
    decode: Buckets = field(default_factory=Buckets)
    inference: Buckets = field(default_factory=Buckets)
    total: Buckets = field(default_factory=Buckets)
    per_token: Buckets = field(default_factory=Buckets)
    prompt_tokens: Buckets = field(default_factory=lambda: Buckets(TOKENS))
    generation_tokens: Buckets = field(default_factory=lambda: Buckets(TOKENS))
    step_tokens: Buckets = field(default_factory=lambda: Buckets(TOKENS))
    finished: Counter[str] = field(default_factory=Counter)

    def end(self, times: RequestMetrics, num_prompt: int, generated: Sequence[int], reasons: Sequence[str]) -> None:
        """Takes in a request that has ended: the number of tokens of each output and why it ended."""
        self.finished.update(reasons)
        self.prompt_tokens.add(num_prompt)
        self.generation_tokens.add(sum(generated))
        start, first, end = times.first_scheduled_time, times.first_token_time, times.finished_time
        if end is None or start is None or first is None:  # it was aborted before it had a token
            return
        self.prefill.add(first - start)
        self.decode.add(end - first)
        self.inference.add(end - start)
        self.total.add(end - times.arrival_time)
        if max(generated) > 1:
            self.per_token.add((end - first) / (max(generated) - 1))
