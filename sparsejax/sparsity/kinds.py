"""The ways to select pages and what each needs, as data that needs no JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sparsejax.errors import ConfigError

type Units = Literal["rank", "logits", "probability"]


@dataclass(frozen=True)
class Select:
    """A way to choose the pages that a decode step reads.

    Attributes:
        name: as `SparsityConfig.select` takes it.
        units: what scores mean. ``rank``: only their order does; ``logits``: their softmax over pages estimates
            attention probability; ``probability``: they are shares of it.
        bounds: scoring reads the key bounds of pages.
        reads_all: scoring reads every page.
        shared: one list for all KV heads.
        function: a user's own scores; None for those of `sparsejax.sparsity.select`.
    """

    name: str
    units: Units = "rank"
    bounds: bool = False
    reads_all: bool = False
    shared: bool = False
    function: Callable[..., Any] | None = None

    @classmethod
    def scored(
        cls,
        function: Callable[..., Any],
        *,
        units: Units = "rank",
        bounds: bool = False,
        name: str | None = None,
    ) -> Select:
        """A select of your own: ``SparsityConfig(select=Select.scored(function))``.

        Args:
            function: gets a `sparsejax.sparsity.select.Query` and the rows' `PolicyRows`, and returns scores
                ``[B or 1, K or 1, S]`` of their pages, larger is read first; -inf is never read. It is compiled
                into the engine's steps, so every engine that serves it must be given the same function.
            units: what the scores mean; ``top_p`` and filter layers need more than a rank.
            bounds: it reads ``query.bounds``.
            name: shown in messages; the function's own name where it is not given.

        Raises:
            ConfigError: no function, or units that do not exist.
        """
        if not callable(function):
            raise ConfigError(f"Select.scored({function!r}): give a function (query, policy) -> scores.")
        if units not in UNITS:
            raise ConfigError(f"units={units!r} is not one of {', '.join(map(repr, UNITS))}.")
        return cls(name or getattr(function, "__name__", "scored"), units, bounds, function=function)


UNITS: tuple[Units, ...] = ("rank", "logits", "probability")
ALL = Select("all")
SELECTS: dict[str, Select] = {
    select.name: select
    for select in (
        ALL,
        Select("window", shared=True),
        Select("strided", shared=True),
        Select("random", shared=True),
        Select("oracle", "probability", reads_all=True),
        Select("quest", "logits", bounds=True),
        Select("omnikv", "probability", reads_all=True, shared=True),
    )
}
