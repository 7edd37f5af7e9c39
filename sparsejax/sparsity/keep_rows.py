"""What the rows of a step evict and observe, as data: one compiled step serves every mix of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sparsejax.sparsity.eviction import Eviction, Keep
from sparsejax.sparsity.seen import Observe

NEVER = 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeepRows:
    """Attributes:
    method: index into the methods that the engine compiled.
    sink, recent: tokens that always stay.
    first, every, period: of the tokens at positions ``first + i * every`` the query of the i-th is observed;
        after `period` positions i starts at 0 again.
    counted: whether all attention is counted; 0 or 1.
    """

    method: Int[Array, " B"]
    sink: Int[Array, " B"]
    recent: Int[Array, " B"]
    first: Int[Array, " B"]
    every: Int[Array, " B"]
    period: Int[Array, " B"]
    counted: Int[Array, " B"]

    @classmethod
    def neutral(cls, num_rows: int) -> KeepRows:
        """Rows that keep everything and observe nothing."""
        return cls(**{name: jnp.full(num_rows, value) for name, value in _pack().items()})

    def with_row(self, row: Int[Array, ""], values: dict[str, Array]) -> KeepRows:
        """The same with one row replaced."""
        return KeepRows(**{name: getattr(self, name).at[row].set(value) for name, value in values.items()})

    def at(self, rows: Int[Array, "*R"]) -> KeepRows:
        """The values of some rows."""
        return KeepRows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def observe(
        self,
        rows: Int[Array, " B"],
        token_rows: Int[Array, " T"],
        positions: Int[Array, " T"],
        live: Bool[Array, " T"],
        size: int,
    ) -> Observe:
        """What the T tokens of B rows add, where `size` queries are stored per row."""
        return Observe(*self.slots(token_rows, positions, live, size), self.counted[rows] > 0)

    def slots(
        self, rows: Int[Array, " T"], positions: Int[Array, " T"], live: Bool[Array, " T"], size: int
    ) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
        """Row and index under which the query of each token is stored; the spare row where it is not."""
        its = self.at(rows)
        since = positions - its.first
        index, odd = jnp.divmod(since % its.period, its.every)
        stored = live & (since >= 0) & (odd == 0) & (index < size)
        return jnp.where(stored, rows, len(self.method) - 1), jnp.where(stored, index, 0)

    def positions(self, row: Int[Array, ""], at: Int[Array, ""], size: int) -> Int[Array, " W"]:
        """Positions of the stored queries of `row` when `at` of its tokens are computed; -1 where there is none."""
        its = self.at(row)
        start = its.first + (at - 1 - its.first) // its.period * its.period
        positions = start + jnp.arange(size) * its.every
        return jnp.where((positions >= 0) & (positions < at), positions, -1)


def pack_keep(keep: Keep, method: int, eviction: Eviction | None) -> dict[str, np.ndarray]:
    """One row of `KeepRows` for a request that evicts under `eviction`, by the engine's method of this index."""
    if eviction is None:
        return _pack()
    values = dict(method=method, sink=keep.sink, recent=keep.recent)
    if keep.observes == "last":
        values.update(first=eviction.at - keep.window, period=eviction.interval or NEVER)
        values["recent"] = max(keep.recent, keep.window)
    elif keep.observes == "spread":
        values.update(first=0, every=-(-eviction.at // keep.window))
    elif keep.observes == "all":
        values.update(counted=1)
    return _pack(**values)


def _pack(**values: int) -> dict[str, np.ndarray]:
    row = dict(method=0, sink=0, recent=1, first=NEVER, every=1, period=NEVER, counted=0)
    return {name: np.array(value, np.int32) for name, value in {**row, **values}.items()}
