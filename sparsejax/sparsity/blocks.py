"""Key bounds of blocks of a row's pages: the first level of selections that do not score every page.

A block bounds the keys of `size` consecutive pages of one row, so no page of it scores higher (the logical pages of
LServe, arXiv 2502.14866, taken one level up). Blocks are made from the bounds of pages when a step first needs them,
whatever sealed those: a prompt, a shared prefix, an eviction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query

AT_ONCE = 16  # blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Entry ``row * M + i`` of `bounds` is that of block i of a row, as `page_bounds` of a page; `made` [R] of each
    row's hold. `size` is the pages of a block."""

    bounds: Float[Array, "N K X"]
    made: Int[Array, " R"]
    size: int = field(metadata={"static": True})

    @classmethod
    def empty(cls, rows: int, longest: int, size: int, tile: tuple[int, int], dtype: jnp.dtype) -> Blocks:
        """None made, for rows of `longest` pages; `tile` is KV heads and twice the head dim."""
        each = -(-longest // size) + AT_ONCE - 1
        return cls(jnp.zeros((rows * each, *tile), dtype), jnp.zeros(rows, jnp.int32), size)

    @property
    def each(self) -> int:
        """Entries of a row."""
        return self.bounds.shape[0] // self.made.shape[0]

    def without(self, row: Int[Array, ""]) -> Blocks:
        """The same with none made of `row`."""
        return Blocks(self.bounds, self.made.at[row].set(0), self.size)

    def completed(
        self, rows: Int[Array, " B"], wanted: Int[Array, " B"], bounds: Float[Array, "N K X"], page_ids: Array
    ) -> Blocks:
        """The same with the first `wanted` blocks of `rows` made, whose pages [B, 1, S] are sealed."""
        page_ids = jnp.pad(page_ids[:, 0], ((0, 0), (0, self.each * self.size - page_ids.shape[2])))
        half = bounds.shape[2] // 2

        def one_row(b: Array, stored: Array) -> Array:
            def some(i: Array, stored: Array) -> Array:
                first = self.made[rows[b]] + i * AT_ONCE
                pages = lax.dynamic_slice(page_ids, (b, first * self.size), (1, AT_ONCE * self.size))
                tiles = bounds[pages[0]].reshape(AT_ONCE, self.size, *bounds.shape[1:])
                made = jnp.concatenate([tiles[..., :half].min(1), tiles[..., half:].max(1)], axis=-1)
                return lax.dynamic_update_slice(stored, made, (rows[b] * self.each + first, 0, 0))

            missing = jnp.maximum(wanted[b] - self.made[rows[b]], 0)
            return lax.fori_loop(0, (missing + AT_ONCE - 1) // AT_ONCE, some, stored)

        stored = lax.fori_loop(0, len(rows), one_row, self.bounds)
        return Blocks(stored, self.made.at[rows].max(wanted), self.size)

    def scores(self, q: Float[Array, "B H D"], rows: Int[Array, " B"], counts: Int[Array, " B"]) -> Array:
        """Bounds [B, K, M] of the scores of one query per row with the keys of its first `counts` blocks."""
        ids = rows[:, None, None] * self.each + jnp.arange(self.each, dtype=jnp.int32)
        return pallas_kernels.page_scores(q, self.bounds, ids, counts[:, None], group="max")

    def pages_of(
        self, blocks: Int[Array, "B Ks W"], counts: Int[Array, "B Ks"], query: Query
    ) -> Query:
        """`query` over the pages of listed blocks only, of which the row's last is the last of each list."""
        listed = query.counts[:, :1]
        logical = (blocks[..., None] * self.size + jnp.arange(self.size)).reshape(*blocks.shape[:2], -1)
        logical = jnp.minimum(logical, query.page_ids.shape[2] - 1)
        whole = jnp.broadcast_to(query.page_ids, (*blocks.shape[:2], query.page_ids.shape[2]))
        short = -listed % self.size
        return query._replace(
            page_ids=jnp.take_along_axis(whole, logical, axis=2),
            logical_ids=logical,
            counts=counts * self.size - short,
        )


def pays(policy: PolicyRows, listed: Int[Array, " B"], size: int) -> Bool[Array, " B"]:
    """Whether blocks and candidates are less than half of what scoring every page of rows of `listed` pages takes.

    At equal numbers two levels take longer: two selections, and candidates that differ by KV head.
    """
    scored = -(-listed // size) + policy.blocks * size
    return (policy.blocks > 0) & (2 * scored < listed)


def ends(policy: PolicyRows, listed: Int[Array, " B"], size: int) -> tuple[Array, Array, Array]:
    """Blocks of rows of `listed` pages: all of them, those that hold sinks, those that hold recents."""
    count = -(-listed // size)
    unpinned = jnp.maximum(listed - policy.recents, 0) // size
    return count, -(-policy.sinks // size), jnp.maximum(count - unpinned, 1)
