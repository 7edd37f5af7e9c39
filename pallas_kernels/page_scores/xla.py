"""`page_scores` in XLA: a loop over rows, in it a product of the row's queries with each block of bounds."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.groups import HIDDEN, reduce_group
from pallas_kernels.page_scores.queries import beside
from pallas_kernels.pages import batched

BLOCK = 256  # pages


def page_scores(
    q: Array, bounds: Array, page_ids: Array, counts: Array, *, group: str = "max", scale: float
) -> Array:
    """See `pallas_kernels.page_scores`."""
    rows = q.shape[0]
    _, kv_heads, minor = bounds.shape
    size = min(BLOCK, page_ids.shape[2])
    padding = (0, -page_ids.shape[2] % size)
    lists = jnp.pad(page_ids, ((0, 0), (0, 0), padding))
    queries = beside(q, kv_heads, minor, group) * scale
    head = jnp.arange(kv_heads)[:, None]

    def one_row(row: Array, scores: Array) -> Array:
        def block(i: Array, scores: Array) -> Array:
            start = i * size
            listed = start + jnp.arange(size) < counts[row][:, None]  # [Kl, size]
            ids = lax.dynamic_slice(lists, (row, 0, start), (1, lists.shape[1], size))[0]
            tiles = bounds.at[jnp.where(listed, ids, 0), head].get(mode="promise_in_bounds")
            bound = batched("kgd,ksd->kgs", queries[row], tiles.astype(jnp.float32))
            bound = jnp.where(listed, reduce_group(bound, group, axis=1), HIDDEN)
            return lax.dynamic_update_slice(scores, bound[None], (row, 0, start))

        return lax.fori_loop(0, (counts[row].max() + size - 1) // size, block, scores)

    scores = jnp.full((rows, kv_heads, lists.shape[2]), HIDDEN)
    return lax.fori_loop(0, rows, one_row, scores)[:, :, : page_ids.shape[2]]
