"""What has been seen of attention in one layer, for evictions to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from sparsejax.cache.layout import Pools, move_tokens
from sparsejax.cache.paged import Rows, StepBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observe:
    """What a step's tokens add.

    Attributes:
        rows, slots: row and index under which each token's query is stored; the spare row where it is not.
        counted: whether the attention of each decode row is counted; `chunks_counted`: of each row with a chunk.
    """

    rows: Int[Array, " T"]
    slots: Int[Array, " T"]
    counted: Bool[Array, " B"]
    chunks_counted: Bool[Array, " B2"] | None = None

    def with_chunks(self, chunks: Observe) -> Observe:
        """Decode rows, then rows with chunks."""
        rows, slots = (jnp.concatenate(parts) for parts in ((self.rows, chunks.rows), (self.slots, chunks.slots)))
        return Observe(rows, slots, self.counted, chunks.counted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """Attributes:
    queries: of each row before rotation, those that its method looks at; None where no method does.
    mass: probability that queries have given to each token slot of each page; None where no method counts it.
    """

    queries: Float[Array, "B W H D"] | None
    mass: Float[Array, "N K P"] | None

    def with_step(
        self,
        q: Float[Array, "T H D"],
        rotated: Float[Array, "T H D"],
        pools: Pools,
        batch: StepBatch,
        options: dict[str, Any],
    ) -> Seen:
        """Takes in the queries of a step whose keys and values are in `pools`."""
        queries, mass, observe = self.queries, self.mass, batch.observe
        if queries is not None:
            queries = queries.at[observe.rows, observe.slots].set(q)
        if mass is not None:
            head = jnp.arange(mass.shape[1])
            mass = mass.at[batch.page_ids[:, None], head, batch.offsets[:, None]].set(0)
            count = batch.decode.lengths.shape[0]
            mass = _add_decode(mass, rotated[:count], pools, batch.decode, observe.counted, options)
            if batch.prefill is not None:
                mass = _add_prefill(mass, rotated[count:], pools, batch.prefill, observe.chunks_counted, options)
        return Seen(queries, mass)

    def with_tokens_moved(
        self, page_ids: Int[Array, " S"], slots: Int[Array, "K C"], new_pages: Int[Array, " S2"]
    ) -> Seen:
        """Mass moves with its token."""
        if self.mass is None:
            return self
        return replace(self, mass=move_tokens(self.mass[..., None], page_ids, slots, new_pages)[..., 0])


def _add_decode(mass: Array, q: Array, pools: Pools, rows: Rows, counted: Array, options: dict[str, Any]) -> Array:
    attend = pallas_kernels.paged_decode_attention
    return _add(mass, q, pools, rows, counted, options, attend, ())


def _add_prefill(mass: Array, q: Array, pools: Pools, rows: Rows, counted: Array, options: dict[str, Any]) -> Array:
    attend = pallas_kernels.paged_prefill_attention
    return _add(mass, q, pools, rows, counted, options, attend, (rows.query_starts,))


def _add(
    mass: Array,
    q: Array,
    pools: Pools,
    rows: Rows,
    counted: Array,
    options: dict[str, Any],
    attend: Callable[..., tuple[Array, Array]],
    starts: tuple[Array, ...],
) -> Array:
    """Adds what the queries of counted rows give to every token: a second pass, skipped where no row is counted."""
    page_ids, counts = rows.page_list(mass.shape[2])
    lists = page_ids, jnp.where(counted[:, None], counts, 0), rows.lengths

    def add(mass: Array) -> Array:
        _, lse = attend(q, *pools, *lists, *starts, return_lse=True, **options)
        plain = {name: value for name, value in options.items() if name != "implementation"}
        given = pallas_kernels.attention_mass(q, pools[0], *lists, lse, *starts, per_token=True, **plain)
        used = jnp.where(jnp.arange(page_ids.shape[2]) < lists[1][:, :, None], page_ids, 0)
        return mass.at[used, jnp.arange(mass.shape[1])[:, None]].add(given)

    return lax.cond(counted.any(), add, lambda mass: mass, mass)
