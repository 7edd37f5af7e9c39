"""Policies of the rows of a step, as data: one compiled step serves every mix of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.sparsity.kinds import ALL, Select
from sparsejax.sparsity.policy import SparsityConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyRows:
    """Attributes:
    kind: 0 reads all; others are places in the engine's selects, from 1.
    budget, sinks, recents, growth, stride: pages, see `policy.PageCounts`.
    interval: decode steps.
    top_p: a share of attention probability.
    seed: of the random select.
    shared: 1 where all KV heads read one list, 0 elsewhere.
    roles: what each of the L layers does, see `policy.Role`.
    """

    kind: Int[Array, " B"]
    budget: Int[Array, " B"]
    sinks: Int[Array, " B"]
    recents: Int[Array, " B"]
    growth: Int[Array, " B"]
    stride: Int[Array, " B"]
    interval: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]
    shared: Int[Array, " B"]
    roles: Int[Array, "B L"]

    @classmethod
    def neutral(cls, num_rows: int, num_layers: int) -> PolicyRows:
        """Rows that read everything."""
        row = pack_policy(SparsityConfig(), 1, 1, (ALL,), num_layers)
        return cls(**{name: jnp.broadcast_to(value, (num_rows, *value.shape)) for name, value in row.items()})

    def at(self, rows: Int[Array, " R"]) -> PolicyRows:
        """The policies of some rows."""
        return PolicyRows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def with_row(self, row: Int[Array, ""], values: dict[str, Array]) -> PolicyRows:
        """The same with one row replaced."""
        return PolicyRows(**{name: getattr(self, name).at[row].set(value) for name, value in values.items()})


def pack_policy(
    config: SparsityConfig, num_prompt: int, page_size: int, selects: tuple[Select, ...], num_layers: int
) -> dict[str, np.ndarray]:
    """One row of `PolicyRows`; `selects` are those of the engine, of which the first is `kinds.ALL`."""
    pages = config.page_counts(num_prompt, page_size)
    row = dict(
        kind=selects.index(config.kind),
        budget=pages.budget,
        sinks=pages.sinks,
        recents=pages.recents,
        growth=pages.growth,
        stride=pages.stride,
        interval=config.interval,
        seed=config.seed % 2**31,
        shared=config.shared,
        roles=config.layer_roles(num_layers),
    )
    packed = {name: np.array(value, np.int32) for name, value in row.items()}
    return {**packed, "top_p": np.array(config.top_p, np.float32)}
