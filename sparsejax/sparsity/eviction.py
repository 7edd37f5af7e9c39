"""`Keep`: which tokens stay in the cache, and when the others leave it. Imports no JAX."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
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
MOST_CLASSES = 4
"""Classes of layers, by depth, between which budgets may differ: each has page tables and pools of its own."""
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
        beta: budgets of layers fall with depth, linearly and with `budget` as their mean, down to what is pinned and
            one part in `beta` of the rest (Cai et al., PyramidKV, arXiv 2406.02069), by classes of layers; 1 gives
            every layer the same.
    """

    method: str | Callable[[Any], Any] = "all"
    budget: int | float = 1024
    sink: int = 4
    recent: int = 32
    window: int = 32
    pool: int = 7
    interval: int = 128
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.method) and self.method not in OBSERVES:
            raise ConfigError(f"keep={self.method!r} is not one of {', '.join(map(repr, OBSERVES))}.")
        valid.budget(self.budget)
        for name, least in (("sink", 0), ("recent", 1), ("window", 1), ("pool", 1), ("interval", 1)):
            valid.integer(name, getattr(self, name), least)
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)) or not self.beta >= 1:
            raise ConfigError(f"beta={self.beta!r} must be a number of at least 1, which gives all layers the same.")
        if self.pool % 2 == 0:
            raise ConfigError(f"pool={self.pool} must be odd, so that a token is in the middle of its neighbours.")
        if self.method in AGAIN and self.observes == "last" and self.interval < self.window:
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
        """Tokens that stay at an eviction of a request whose prompt has `num_prompt` tokens, the mean over layers."""
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * num_prompt)
        return max(tokens, self._pinned)

    def eviction(self, num_prompt: int, bands: tuple[int, ...] = (1,)) -> Eviction | None:
        """When a request with this prompt evicts, and what stays; None if it never does.

        Args:
            bands: layers of each class, by depth (see `bands`).
        """
        if self.method == "all":
            return None
        kept = self.kept(num_prompt)
        if self.method in AGAIN:
            first = kept + self.interval
            at = first if self.method in EVEN_IN_PROMPTS else max(num_prompt, first)
            return Eviction(at, self._spread(kept, at, bands), self.interval)
        return Eviction(num_prompt, self._spread(kept, num_prompt, bands)) if num_prompt > kept else None

    def skippable(self, num_prompt: int) -> int | None:
        """Leading tokens that need not be computed where their pages are at hand: those whose queries no eviction
        looks at. None is any number."""
        eviction = self.eviction(num_prompt)
        if eviction is None:
            return None
        if self.observes in ("spread", "all"):
            return 0
        return eviction.at - (self.window if self.observes == "last" else 1)

    def most_kept(self, num_prompt: int, bands: tuple[int, ...]) -> int:
        """Tokens that at most stay in any layer at an eviction of prompts of up to `num_prompt` tokens."""
        return max(self._spread(self.kept(num_prompt), max(num_prompt, self.kept(num_prompt)), bands))

    @property
    def _pinned(self) -> int:
        return self.sink + (max(self.recent, self.window) if self.observes == "last" else self.recent)

    def _spread(self, kept: int, most: int, bands: tuple[int, ...]) -> tuple[int, ...]:
        """Budgets of classes of layers whose mean over layers is `kept`, rounded in favour of the first class."""
        layers, free = sum(bands), kept - self._pinned
        high = min(2 * free - free / self.beta, most - self._pinned)
        fall = 2 * (high - free) / max(layers - 1, 1)
        ends = list(itertools.accumulate(bands))
        middles = [end - (count + 1) / 2 for end, count in zip(ends, bands, strict=True)]
        deeper = [self._pinned + math.floor(high - fall * middle) for middle in middles[1:]]
        rest = kept * layers - sum(count * tokens for count, tokens in zip(bands[1:], deeper, strict=True))
        return (min(rest // bands[0], most), *deeper)


def bands(keeps: Iterable[Keep], num_layers: int) -> tuple[int, ...]:
    """Layers of each class, by depth: one class where the budgets of no keep differ between layers."""
    classes = min(MOST_CLASSES, num_layers) if any(keep.beta > 1 for keep in keeps) else 1
    ends = [num_layers * (index + 1) // classes for index in range(classes)]
    return tuple(end - start for start, end in itertools.pairwise([0, *ends]))


@dataclass(frozen=True)
class Eviction:
    """Once `at` tokens are computed `kept` of them stay in each class of layers; then again after every `interval`."""

    at: int
    kept: tuple[int, ...]
    interval: int | None = None

    def peak_pages(self, num_tokens: int, page_size: int, gone: Sequence[int] = ()) -> tuple[int, ...]:
        """Most pages held at once, in each class, by a sequence that reaches `num_tokens`: an eviction copies what
        stays.

        Args:
            gone: by class, tokens that evictions have taken already; none have run if there are none.
        """
        gone = gone or (0,) * len(self.kept)
        return tuple(self._peak(*sizes, num_tokens, page_size) for sizes in zip(self.kept, gone, strict=True))

    def _peak(self, kept: int, gone: int, num_tokens: int, page_size: int) -> int:
        def pages(tokens: int) -> int:
            return -(-tokens // page_size)

        since = num_tokens - (gone + kept if gone else self.at)
        if since <= 0:
            return pages(kept if gone else num_tokens)
        after = pages(kept + min(since, self.interval or since))
        again = self.interval is not None and since > self.interval
        return max(0 if gone else pages(self.at) + pages(kept), after + again * pages(kept))
