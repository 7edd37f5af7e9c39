"""Policies of the rows of a step, as data: one compiled step serves every mix of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from sparsejax.sparsity.policy import ALL_PAGES, SELECTS, SparsityConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyRows:
    """Attributes:
    kind: index of the select in `policy.SELECTS`.
    budget, sinks, recents: pages, see `policy.PageCounts`.
    seed: of the random select.
    """

    kind: Int[Array, " B"]
    budget: Int[Array, " B"]
    sinks: Int[Array, " B"]
    recents: Int[Array, " B"]
    seed: Int[Array, " B"]

    @classmethod
    def neutral(cls, num_rows: int) -> PolicyRows:
        """Rows that read everything."""
        rows = dict(kind=0, budget=ALL_PAGES, sinks=0, recents=1, seed=0)
        return cls(**{name: jnp.full(num_rows, value, jnp.int32) for name, value in rows.items()})

    def at(self, rows: Int[Array, " R"]) -> PolicyRows:
        """The policies of some rows."""
        return PolicyRows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def with_row(self, row: Int[Array, ""], values: dict[str, Array]) -> PolicyRows:
        """The same with one row replaced."""
        return PolicyRows(**{name: getattr(self, name).at[row].set(value) for name, value in values.items()})


def pack_policy(config: SparsityConfig, num_prompt: int, page_size: int) -> dict[str, np.ndarray]:
    """One row of `PolicyRows`."""
    pages = config.page_counts(num_prompt, page_size)
    row = dict(
        kind=SELECTS.index(config.select),
        budget=pages.budget,
        sinks=pages.sinks,
        recents=pages.recents,
        seed=config.seed % 2**31,
    )
    return {name: np.array(value, np.int32) for name, value in row.items()}
