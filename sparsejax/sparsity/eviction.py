"""`Keep`: which tokens stay in the cache, and when the others leave it. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity import valid

OBSERVES = {
    "all": None,
    "snapkv": "last",
    "keydiff": None,
    "expected_attention": "spread",
    "rkv": "last",
    "h2o": "all",
    "random": None,
    "streaming": None,
}
"""Ways to choose what stays, and the queries each of them looks at: the last ones before an eviction, ones spread
evenly over the prompt, all of them as they come, or none."""
AGAIN = frozenset({"rkv", "h2o", "streaming"})
"""Ways that evict during decode too, each time `interval` tokens have come in."""
EVEN_IN_PROMPTS = frozenset({"streaming"})
"""Ways that do so while the prompt is read, so that no request ever holds more than its budget and an interval."""


@dataclass(frozen=True)
class Keep:
    """Token eviction: per layer and KV head the `budget` tokens with the largest scores stay, others leave.

    The prompt is read raw until all of it is computed (but for ``streaming``); then its cache is cut, and whole
    pages become free.

    Attributes:
        method: ``all`` evicts nothing; the others are the files of `keep` by name, or a function of your own (see
            `scored`).
        budget: tokens that stay per KV head, sinks and recents included; a float is a share of the prompt.
        sink, recent: tokens at the start and at the end that always stay.
        window: queries that are observed.
        pool: neighbouring tokens over which scores of observed queries are averaged, an odd number.
        interval: for methods that evict during decode, the tokens between two evictions.
    """

    method: str | Callable[[Any], Any] = "all"
    budget: int | float = 1024
    sink: int = 4
    recent: int = 32
    window: int = 32
    pool: int = 7
    interval: int = 128

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in OBSERVES:
            raise ConfigError(f"keep={self.method!r} is not one of {', '.join(map(repr, OBSERVES))}.")
        valid.budget(self.budget)
        for name, least in (("sink", 0), ("recent", 1), ("window", 1), ("pool", 1), ("interval", 1)):
            valid.integer(name, getattr(self, name), least)
        if self.pool % 2 == 0:
            raise ConfigError(f"pool={self.pool} must be odd, so that a token is in the middle of its neighbours.")
        if self.method in AGAIN and self.observes and self.interval < self.window:
            raise ConfigError(f"interval={self.interval} must be at least window={self.window}.")

    @classmethod
    def scored(cls, score: Callable[[Any], Any], **parameters: Any) -> Keep:
        """Keeps the tokens with the largest ``score(view)``, a function like those of the files of `keep`.

        It sees the last queries of the prompt. An engine compiles it in, so it must be declared at its start.
        """
        return cls(score, **parameters)

    @property
    def name(self) -> str:
        return getattr(self.method, "__name__", "scored") if callable(self.method) else self.method

    @property
    def observes(self) -> str | None:
        """Which queries the method looks at: the ``last`` ones, ones ``spread`` over the prompt, ``all``, or None."""
        return "last" if callable(self.method) else OBSERVES[self.method]

    @property
    def compiled(self) -> tuple[str | Callable[[Any], Any], int, int]:
        """What a compiled step fixes; everything else is data of a request."""
        return self.method, self.window, self.pool

    def kept(self, num_prompt: int) -> int:
        """Tokens that stay at an eviction of a request whose prompt has `num_prompt` tokens."""
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * num_prompt)
        pinned = max(self.recent, self.window) if self.observes == "last" else self.recent
        return max(tokens, self.sink + pinned)

    def eviction(self, num_prompt: int) -> Eviction | None:
        """When a request with this prompt evicts, and what stays; None if it never does."""
        if self.method == "all":
            return None
        kept = self.kept(num_prompt)
        if self.method in AGAIN:
            first = kept + self.interval
            return Eviction(first if self.method in EVEN_IN_PROMPTS else max(num_prompt, first), kept, self.interval)
        return Eviction(num_prompt, kept) if num_prompt > kept else None

    def skippable(self, num_prompt: int) -> int | None:
        """Leading tokens that need not be computed where their pages are at hand: those whose queries no eviction
        looks at. None is any number."""
        eviction = self.eviction(num_prompt)
        if eviction is None:
            return None
        if self.observes in ("spread", "all"):
            return 0
        return eviction.at - (self.window if self.observes == "last" else 1)


@dataclass(frozen=True)
class Eviction:
    """Once `at` tokens are computed `kept` of them stay; then again after every `interval` further ones."""

    at: int
    kept: int
    interval: int | None = None

    def peak_pages(self, num_tokens: int, page_size: int) -> int:
        """Most pages held at once by a sequence that reaches `num_tokens`: an eviction copies what stays."""

        def pages(tokens: int) -> int:
            return -(-tokens // page_size)

        since = num_tokens - self.at
        if since <= 0:
            return pages(num_tokens)
        after = pages(self.kept + min(since, self.interval or since))
        again = self.interval is not None and since > self.interval
        return max(pages(self.at) + pages(self.kept), after + again * pages(self.kept))
