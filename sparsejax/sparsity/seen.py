"""What has been seen of attention in one layer, for evictions to come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sparsejax.cache.layout import pick_tokens, put_pages
from sparsejax.cache.paged import Rows, StepBatch
from sparsejax.cache.views import CodedChunks, CodedPages, DensePages


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
        pages: DensePages | CodedPages,
        chunk_pages: DensePages | CodedChunks | None,
        batch: StepBatch,
        options: dict[str, Any],
    ) -> Seen:
        """Takes in the queries of a step, whose keys and values its decode rows and its chunks read in these pages."""
        queries, mass, observe = self.queries, self.mass, batch.observe
        if queries is not None:
            queries = queries.at[observe.rows, observe.slots].set(q)
        if mass is not None:
            head = jnp.arange(mass.shape[1])
            mass = mass.at[batch.page_ids[:, None], head, batch.offsets[:, None]].set(0)
            count = batch.decode.lengths.shape[0]
            mass = _add(mass, rotated[:count], pages, batch.decode, observe.counted, options)
            if batch.prefill is not None:
                mass = _add(mass, rotated[count:], chunk_pages, batch.prefill, observe.chunks_counted, options)
        return Seen(queries, mass)

    def of_row(self, page_ids: Int[Array, " S"]) -> Float[Array, "K U"] | None:
        """The mass of every token slot of a row's pages."""
        if self.mass is None:
            return None
        heads = self.mass.shape[1]
        return self.mass[page_ids, jnp.arange(heads)[:, None]].reshape(heads, -1)

    def with_tokens_moved(
        self, page_ids: Int[Array, " S"], slots: Int[Array, "K C"], new_pages: Int[Array, " S2"]
    ) -> Seen:
        """Mass moves with its token."""
        if self.mass is None:
            return self
        moved = pick_tokens(self.mass[..., None], page_ids, slots, len(new_pages))[..., 0]
        return replace(self, mass=put_pages(self.mass, moved, new_pages))


def _add(
    mass: Float[Array, "N K P"],
    q: Float[Array, "T H D"],
    pages: DensePages | CodedPages | CodedChunks,
    rows: Rows,
    counted: Bool[Array, " B"],
    options: dict[str, Any],
) -> Float[Array, "N K P"]:
    """Adds what the queries of counted rows give to every token: a second pass, skipped where no row is counted."""
    page_ids, counts = rows.page_list(mass.shape[2])
    starts = () if rows.query_starts is None else (rows.query_starts,)

    def add(mass: Array) -> Array:
        some = jnp.where(counted[:, None], counts, 0)
        for ids, used, given in pages.given(q, page_ids, some, rows.lengths, *starts, **options):
            ids = jnp.where(jnp.arange(ids.shape[1]) < used, ids, 0)
            mass = mass.at[ids[:, None], jnp.arange(mass.shape[1])[:, None]].add(given)
        return mass

    return lax.cond(counted.any(), add, lambda mass: mass, mass)
