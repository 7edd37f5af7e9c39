"""Policies of the rows of a step, as data: one compiled step serves every mix of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.sparsity.kinds import ALL, Select
from sparsejax.sparsity.policy import ALL_PAGES, SparsityConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyRows:
    """Attributes:
    kind: 0 reads all; others are places in the engine's selects, from 1.
    budget, sinks, recents, growth, stride, blocks: pages, see `policy.PageCounts`.
    interval: decode steps.
    top_p: a share of attention probability.
    recall_every, recall_floor: positions and a share of attention probability, see `SparsityConfig`.
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
    blocks: Int[Array, " B"]
    interval: Int[Array, " B"]
    top_p: Float[Array, " B"]
    recall_every: Int[Array, " B"]
    recall_floor: Float[Array, " B"]
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

    def guarded(
        self, rows: Int[Array, " R"], recall: Float[Array, "R L"], width: int
    ) -> tuple[PolicyRows, Int[Array, "R 2"]]:
        """The policies after rows captured `recall` of each layer's attention probability (-1: not measured).

        A row whose mean lies under its floor gets twice its budget, or everything where lists of `width` pages do
        not hold that. Returns also which rows got more, and which of them everything.
        """
        measured = recall >= 0
        mean = jnp.where(measured, recall, 0).sum(-1) / jnp.maximum(measured.sum(-1), 1)
        low = measured.any(-1) & (mean < self.recall_floor[rows])
        wider = 2 * self.budget[rows]
        everything = low & (wider > width)
        budget = jnp.where(everything, ALL_PAGES, jnp.where(low, wider, self.budget[rows]))
        more = jnp.stack([low, everything], -1).astype(jnp.int32)
        return replace(self, budget=self.budget.at[rows].set(budget)), more


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
        blocks=pages.blocks,
        interval=config.interval,
        recall_every=config.recall_every,
        seed=config.seed % 2**31,
        shared=config.shared,
        roles=config.layer_roles(num_layers),
    )
    packed = {name: np.array(value, np.int32) for name, value in row.items()}
    shares = dict(top_p=config.top_p, recall_floor=config.recall_floor)
    return {**packed, **{name: np.array(value, np.float32) for name, value in shares.items()}}
