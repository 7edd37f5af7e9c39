"""`SparsityConfig`: what a request reads of its KV cache. Imports no JAX."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity.eviction import Keep

SELECTS = ("all", "window", "random", "oracle", "quest")
"""Ways to choose the pages that a decode step reads; the files of `select` by name, and all of them."""
NEEDS_BOUNDS = frozenset({"quest"})


@dataclass(frozen=True)
class SparsityConfig:
    """A point of keep ∘ select ∘ codec.

    The prompt is read densely. Then `keep` cuts the cache, and every decode step reads the selected pages of what
    is left in each layer. A budget that covers the sequence keeps and reads all of it.

    Attributes:
        keep: which tokens stay in the cache: a `Keep`, or the name of its method.
        select: which pages a decode step reads: ``all``; ``window``, the newest; ``random``, a fixed random
            subset of the request; ``oracle``, the pages with the largest attention probability (it reads
            everything to know them: a bound on what selection can reach, not a method); ``quest``, the
            largest upper bounds of the attention scores (Tang et al., arXiv 2406.10774).
        budget: tokens read per KV head, sinks and recents included; a float is a share of the prompt.
        sink, recent: tokens at the start and at the end that are always read, rounded up to pages.
        seed: of ``random``.
    """

    keep: Keep | str = "all"
    select: str = "all"
    budget: int | float = 2048
    sink: int = 4
    recent: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Keep):
            object.__setattr__(self, "keep", Keep(self.keep))
        if self.select not in SELECTS:
            raise ConfigError(f"select={self.select!r} is not one of {', '.join(map(repr, SELECTS))}.")
        share = isinstance(self.budget, float)
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not self.budget > 0:
            raise ConfigError(f"budget={self.budget!r}: give tokens (an integer) or a share of the prompt (a float).")
        if share and self.budget > 1:
            raise ConfigError(f"budget={self.budget!r}: a share lies in (0, 1]; give an integer for tokens.")
        for name in ("sink", "recent", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 0.")

    @classmethod
    def preset(cls, name: str, **parameters: Any) -> SparsityConfig:
        """A preset by name, with parameters changed: those of its keep if it evicts, those of its select if not.

        Raises:
            ConfigError: there is no such preset or parameter.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(str(name), PRESETS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"sparsity={name!r} is not a preset{hint}; there are {', '.join(PRESETS)}.")
        preset = PRESETS[name]
        changed = preset if preset.keep.method == "all" else preset.keep
        known = [field.name for field in dataclasses.fields(changed)]
        for key in parameters:
            if key not in known:
                raise ConfigError(f"{key!r} is no parameter of {name!r}; there are {', '.join(known)}.")
        changed = dataclasses.replace(changed, **parameters)
        return changed if isinstance(changed, cls) else dataclasses.replace(preset, keep=changed)

    @classmethod
    def coerce(cls, value: Any) -> SparsityConfig:
        """A config, a preset's name, or a mapping such as ``{"preset": "quest", "budget": 1024}``."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.preset(value)
        if isinstance(value, Mapping) and "preset" in value:
            return cls.preset(**{"name" if key == "preset" else key: item for key, item in value.items()})
        raise ConfigError(
            f"sparsity={value!r}: give a SparsityConfig, the name of a preset or a mapping with 'preset' "
            f"({', '.join(PRESETS)})."
        )

    def page_counts(self, num_prompt: int, page_size: int) -> PageCounts:
        """Budget, sinks and recents of a request in pages; the budget holds what is pinned."""
        if self.select == "all":
            return PageCounts(ALL_PAGES, 0, 1)
        sinks = -(-self.sink // page_size)
        # The open page, and as many full ones as keep `recent` tokens in view wherever the open one stands.
        recents = 1 + -(-max(self.recent - 1, 0) // page_size)
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * num_prompt)
        return PageCounts(max(-(-tokens // page_size), sinks + recents), sinks, recents)


ALL_PAGES = 2**30


@dataclass(frozen=True)
class PageCounts:
    """Pages that a step reads at most, and those of them at the start and the end that it always reads."""

    budget: int
    sinks: int
    recents: int

    def read(self, listed: int) -> int:
        """Pages read of a list of `listed` ones."""
        return min(listed, self.budget)


PRESETS: dict[str, SparsityConfig] = {
    "dense": SparsityConfig(),
    "window": SparsityConfig(select="window"),
    "random": SparsityConfig(select="random"),
    "oracle": SparsityConfig(select="oracle"),
    "quest": SparsityConfig(select="quest"),
    "snapkv": SparsityConfig(Keep("snapkv")),
    "keydiff": SparsityConfig(Keep("keydiff")),
    "expected_attention": SparsityConfig(Keep("expected_attention", window=64)),
    "rkv": SparsityConfig(Keep("rkv")),
    "random_keep": SparsityConfig(Keep("random")),
}


def declared(value: Any) -> tuple[SparsityConfig, ...]:
    """What an engine offers: one policy or several, the first of them its default."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    if not values:
        raise ConfigError("sparsity=() names no policy; give at least 'dense'.")
    return tuple(SparsityConfig.coerce(item) for item in values)
