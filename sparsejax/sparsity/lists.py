"""What travels between the layers of a step and between steps: lists of selected pages, in logical ids."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsejax.sparsity.blocks import Blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lists:
    """Of each row and KV head (one list for all heads where Ks is 1) `counts` ascending logical ids; 0 is no list."""

    ids: Int[Array, "B Ks J"]
    counts: Int[Array, "B Ks"]

    @classmethod
    def empty(cls, rows: int, heads: int, width: int) -> Lists:
        return cls(jnp.zeros((rows, heads, width), jnp.int32), jnp.zeros((rows, heads), jnp.int32))

    def at(self, rows: Int[Array, " R"]) -> Lists:
        """The lists of some rows."""
        return Lists(self.ids[rows], self.counts[rows])

    def with_rows(self, rows: Int[Array, " R"], lists: Lists) -> Lists:
        """These lists with those of some rows replaced."""
        return Lists(self.ids.at[rows].set(lists.ids), self.counts.at[rows].set(lists.counts))

    def without(self, row: Int[Array, ""]) -> Lists:
        """These lists with none for `row`."""
        return Lists(self.ids, self.counts.at[row].set(0))

    def where(self, mine: Array, others: Lists) -> Lists:
        """These lists for the rows that `mine` [B] names, `others` for the rest."""
        ids = jnp.where(mine[:, None, None], self.ids, others.ids)
        return Lists(ids, jnp.where(mine[:, None], self.counts, others.counts))

    def grown(self, listed: Int[Array, " B"]) -> Lists:
        """The same with the pages that opened since the lists were made: the last of each was the open one."""
        place = jnp.arange(self.ids.shape[2])
        last = jnp.take_along_axis(self.ids, jnp.maximum(self.counts - 1, 0)[..., None], axis=2)
        fresh = jnp.where(self.counts > 0, listed[:, None] - 1 - last[..., 0], 0)
        ids = jnp.where(place < self.counts[..., None], self.ids, last + 1 + place - self.counts[..., None])
        return Lists(ids, self.counts + fresh)

    def physical(self, page_ids: Int[Array, "B 1 S"]) -> Int[Array, "B Ks J"]:
        """Physical ids of the entries; past the counts anything that exists."""
        whole = jnp.broadcast_to(page_ids, (*self.ids.shape[:2], page_ids.shape[2]))
        return jnp.take_along_axis(whole, jnp.minimum(self.ids, page_ids.shape[2] - 1), axis=2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carried:
    """What one layer keeps of its rows between steps: lists that serve several, bounds of blocks; None of what no
    policy uses."""

    lists: Lists | None
    blocks: Blocks | None

    def without(self, row: Int[Array, ""]) -> Carried:
        """The same with nothing of `row`."""
        return Carried(*(None if part is None else part.without(row) for part in (self.lists, self.blocks)))
